"""The documents name what is there: commands, options, verbs, gates, paths and imports."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from twfs_tools.cli import app

TESTS: Final = Path(__file__).parent
ROOT: Final = TESTS.parent
README_LINES_MAX: Final = 120
FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE: Final = re.compile(r"`([^`\n]+)`")
DOCUMENTS: Final = ("README.md", "HACKING.md", "CHANGELOG.md", "SECURITY.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def commands_in(text: str) -> list[str]:
    """Command lines of *text*: those of its blocks without a language, and inline ones."""
    lines = [line for kind, body in FENCE.findall(text) if not kind for line in body.splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    return [line.split("#")[0].strip() for line in lines]


def subcommands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def options_of(command: Any) -> set[str]:
    """All options of *command* and of the commands in it."""
    names = {"--help", "-h"}
    for parameter in command.params:
        names.update([*parameter.opts, *parameter.secondary_opts])
    for child in getattr(command, "commands", {}).values():
        names |= options_of(child)
    return names


def test_every_subcommand_is_in_the_readme() -> None:
    table = [line for line in text_of("README.md").splitlines() if line.startswith("|")]
    named = {name for line in table for name in re.findall(r"`twfs (\w+)`", line)}
    assert named == set(subcommands())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_twfs_command_in_a_document_exists_with_its_options(document: str) -> None:
    there = subcommands()
    for line in commands_in(text_of(document)):
        words = line.split()
        if words[:1] != ["twfs"] or len(words) < 2 or words[1] == "COMMAND":
            continue
        assert words[1] in there, line
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options_of(there[words[1]]), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_verb_of_run_in_a_document_exists(document: str) -> None:
    verbs = set(re.findall(r"^    ([\w-]+)\) ", text_of("run"), re.MULTILINE))
    assert {"setup", "check", "test", "demo", "bench"} <= verbs
    for line in commands_in(text_of(document)):
        if line.startswith("./run "):
            assert line.split()[1] in verbs, line


def test_gates_name_paths_that_hold_tests() -> None:
    paths = re.findall(r"\btests/[\w/.]+", text_of("HACKING.md"))
    assert len(paths) >= 6
    for path in paths:
        program = path.endswith((".py", ".sh"))
        found = [ROOT / path] if program else list((ROOT / path).rglob("test_*.py"))
        assert found, path
        assert all(each.is_file() for each in found), path


def programs() -> set[str]:
    """The programs beside the tests that documents and programs say how to run."""
    texts = [text_of("HACKING.md"), *(path.read_text() for path in TESTS.rglob("*.md"))]
    texts += [path.read_text() for path in TESTS.rglob("*.py")]
    return {name for text in texts for name in re.findall(r"\bpython (tests/[\w/]+\.py)", text)}


@pytest.mark.parametrize("program", sorted(programs() - {"tests/reliability.py"}))
def test_every_program_beside_the_tests_runs_by_its_command_alone(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_paths_in_hacking_exist() -> None:
    for path in INLINE.findall(text_of("HACKING.md")):
        if re.fullmatch(r"(twfs|mount|tools)/[\w/.]*", path):
            assert (ROOT / path).exists(), path


def test_python_in_the_readme_imports_what_is_there() -> None:
    blocks = [body for kind, body in FENCE.findall(text_of("README.md")) if kind == "python"]
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "twfs"
            ):
                assert hasattr(importlib.import_module("twfs"), node.attr), node.attr


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", text_of(document)):
            assert (ROOT / target).exists(), f"{document}: {target}"


def test_every_threat_names_tests_that_exist() -> None:
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    section = text_of("SECURITY.md").partition("## Threats")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert there.issuperset(named), set(named) - there


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES_MAX


def test_changelog_has_the_version() -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert f"\n## {version}\n" in text_of("CHANGELOG.md")


def test_console_scripts_lead_to_functions() -> None:
    for name, target in tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"].items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    parsed = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, check=False)
    assert parsed.returncode == 0, parsed.stderr


def test_run_without_a_verb_says_what_there_is() -> None:
    shown = subprocess.run([ROOT / "run"], capture_output=True, text=True, check=True).stdout
    assert "./run setup" in shown


def test_constraints_pin_every_dependency_without_paths_or_local_versions() -> None:
    lines = [line for line in text_of("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads(text_of("pyproject.toml"))
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    wanted += project["project"]["optional-dependencies"]["demo"]
    names = {re.split(r"[<>=!~\[ ]", each)[0].lower() for each in wanted}
    assert names <= pinned
