"""The code keeps its own rules: short modules and functions, layers, docstrings, our nouns only.

To add a module, put its name into LAYERS: in its package, on a line below all that it imports and
above all that import it; the names of one line do not import each other. Packages stand there in
layers in the same way, so where two modules that belong together would tie two packages both ways,
the imports say where each goes.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
PACKAGE_MODULES_MAX = 15  # engines/ apart, where each engine brings its own

# The packages of twfs/, from the lowest to the highest, and the lines of modules in each. A module
# imports only from lines before its own, and a package only from packages before it. "" is twfs/
# itself: at its bottom the words that all share, at its top what users import.
LAYERS: tuple[tuple[str, str], ...] = (
    ("", """
        copying errors units
        hints layout prefix secret tenants
        config records
        store
        checksums
    """),
    ("metadata", """
        filerows meter tables
        filetables metafile sessions
        environment ledger
    """),
    ("devices", """
        arena extents formatting limbo
        device
        flushing payload
        roster standing wiping
    """),
    ("readers", """
        base
        arenas hanging landing planning probe
        ahead
        cufilewaves host
        cufile staged
        select
    """),
    ("index", """
        charges clocks counting leases uses
        slots
        siblings
    """),
    ("policy", """
        accesses admission retention scoring
        asking recording
        miniature
    """),
    ("core", """
        counters modes operating
        state
        enrolling listing metering
        opening
    """),
    ("eviction", """
        pinning quotas ranking using
        choosing sharing
        evicting
        retaining
    """),
    ("protocol", """
        wire
        messages
        codec
        channel remote
        link
        holding
    """),
    ("datapath", """
        match matching reserving runs sources upload
        putting
        localput offering
    """),
    ("checking", """
        pacing snapshot subject
        accounting covering filecheck proving
        invariants scrubbing
    """),
    ("recovery", """
        salvaging scanning verdicts
        mending survivors
        rebuild repair
    """),
    ("admin", """
        divergence erasing moving purgeable shredding tenancy usage
        advising draining purging
        members
        namespace
    """),
    ("vfs", """
        chainfile spool
        describing drafts importing
        fileblocks nodes
        drafting filerecovery tree
        files
    """),
    ("", """
        client warehouse
        __init__
    """),
    ("daemon", """
        permitting shared
        answers greeting
        connection
        server
    """),
    ("engines", """
        attaching breakeven identity requests
        finding keyed
        sglang_weights transfers vllm_layout vllm_offers vllm_prefill vllm_requests
        vllm_orders
        lmcache sglang transformers vllm vllm_tier
        sglang_linker
    """),
)  # fmt: skip


def ranks() -> dict[str, tuple[int, int]]:
    """Of every module, as `readers.host`, the numbers of its layer and of its line there."""
    found: dict[str, tuple[int, int]] = {}
    for layer, (package, lines) in enumerate(LAYERS):
        for line, names in enumerate(lines.strip().splitlines()):
            for name in names.split():
                module = f"{package}.{name}" if package else name
                assert module not in found, f"{module} stands twice in LAYERS"
                found[module] = layer, line
    return found


RANKS = ranks()
PACKAGES = sorted({package for package, _ in LAYERS if package})

# Words that name nothing of ours (DESIGN.md, nouns), and the names in which they are another's.
BANNED = frozenset(
    noun + plural
    for noun in ("chunk", "page", "slab", "object", "item")
    for plural in ("", "s")
) | {"entry", "entries"}  # fmt: skip
FOREIGN = frozenset(
    {
        "entry_timeout",  # pyfuse3.EntryAttributes
        "page_size",  # lmcache.L2AdapterInterface.list_l2_keys
        "item",  # numpy and torch: array.item()
        "items",  # Mapping.items()
        # Of memory, 4 KiB or huge, as the kernel calls them:
        "pages", "_shared_pages", "HUGE_PAGES", "drop_page_cache",
    }
)  # fmt: skip


def modules(*folders: str) -> list[Path]:
    """The Python files below *folders*, in order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = modules("twfs", "mount", "tools")
LIBRARY = modules("twfs")
TESTS = modules("tests")


def name_of(path: Path) -> str:
    """A file's name for pytest's report."""
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_module_is_short_and_says_what_it_is_for(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MODULE_LINES_MAX, f"{lines} lines: split the module"
    assert ast.get_docstring(parsed(path)) is not None or not lines, "no docstring"


@pytest.mark.parametrize("path", CODE + TESTS, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_test_file_says_what_is_guaranteed(path: Path) -> None:
    assert ast.get_docstring(parsed(path)) or not path.read_text(), "no docstring"


def nodes_of(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """All nodes; without *types* not those under `if TYPE_CHECKING`, of which none is run."""
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes_of(node, types=types)


def imports_of(path: Path, *, types: bool = False) -> Iterator[str]:
    """Modules of twfs that the file at *path* imports, wherever in it, without the `twfs.`."""
    for node in nodes_of(parsed(path), types=types):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{ast.unparse(node)}: write the whole name"
            # `from twfs.index import slots` imports a module, `from twfs.units import Ino` a name.
            names = [
                f"{node.module}.{alias.name}" if is_package(node.module) else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from (name.removeprefix("twfs.") for name in names if name.startswith("twfs."))


def is_package(module: str | None) -> bool:
    return module is not None and (ROOT / module.replace(".", "/")).is_dir()


def is_face(path: Path) -> bool:
    """Whether *path* is the `__init__.py` of a package within twfs/."""
    return path.name == "__init__.py" and path.parent != ROOT / "twfs"


def module_of(path: Path) -> str:
    """`readers.host` of twfs/readers/host.py."""
    return ".".join(path.relative_to(ROOT / "twfs").with_suffix("").parts)


def rank_of(module: str) -> tuple[int, int]:
    assert module in RANKS, f"{module} is in no layer: add it to LAYERS in tests/test_tidy.py"
    return RANKS[module]


@pytest.mark.parametrize("path", [p for p in LIBRARY if not is_face(p)], ids=name_of)
def test_module_imports_only_from_lower_layers(path: Path) -> None:
    module = module_of(path)
    for name in imports_of(path):
        assert rank_of(name) < rank_of(module), f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("path", [p for p in LIBRARY if not is_face(p)], ids=name_of)
def test_packages_form_layers_by_types_too(path: Path) -> None:
    module = module_of(path)
    for name in imports_of(path, types=True):
        assert rank_of(name)[0] <= rank_of(module)[0], (
            f"{module} imports {name} of a higher package"
        )


def test_layers_name_every_module_and_package_once() -> None:
    assert sorted(RANKS) == sorted(module_of(path) for path in LIBRARY if not is_face(path))
    named = [package for package, _ in LAYERS if package]
    assert sorted(named) == PACKAGES
    assert len(LAYERS) - len(named) == 2  # twfs/ itself: below all and above the library


@pytest.mark.parametrize("package", ["", *(each for each in PACKAGES if each != "engines")])
def test_a_package_is_small(package: str) -> None:
    assert len(list((ROOT / "twfs" / package).glob("[!_]*.py"))) <= PACKAGE_MODULES_MAX


@pytest.mark.parametrize("package", PACKAGES)
def test_the_face_of_a_package_says_its_job_and_brings_no_names(package: str) -> None:
    face = parsed(ROOT / "twfs" / package / "__init__.py")
    assert ast.get_docstring(face)
    assert len(face.body) == 1, "import its modules by their own names"


def given_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the module names itself, and not by another's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield 0, node.asname


def words(name: str) -> list[str]:
    """The words of a snake_case or CamelCase *name*."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_names_use_the_nouns_of_the_design(path: Path) -> None:
    assert not BANNED.intersection(words(path.stem)), path.stem
    for line, name in given_names(parsed(path)):
        if name not in FOREIGN:
            found = BANNED.intersection(words(name))
            assert not found, f"line {line}: {name}; the nouns are in DESIGN.md"


def test_the_checks_see_what_they_forbid() -> None:
    source = "class PageTable:\n    def f(self, chunk_size):\n        self.anItem = good_name"
    found = {name for _, name in given_names(ast.parse(source)) if BANNED & set(words(name))}
    assert found == {"PageTable", "chunk_size", "anItem"}
    tree = ast.parse("if TYPE_CHECKING:\n    import a\ndef f():\n    import b")
    for types, expected in ((False, ["b"]), (True, ["a", "b"])):
        found_nodes = nodes_of(tree, types=types)
        seen = [node.names[0].name for node in found_nodes if isinstance(node, ast.Import)]
        assert seen == expected
