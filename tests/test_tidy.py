"""The code keeps its own rules: short modules and functions, layers, docstrings, our nouns only.

To add a module, put its name into LAYERS: on a line below all that it imports and above all that
import it; the names of one line do not import each other.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

# The modules of twfs/: each imports only from lines before its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "units"),
    ("accesses", "clocks", "counters", "operating", "tenants", "uses"),
    ("charges", "copying", "meter", "secret"),
    ("hints", "layout", "prefix", "records"),
    ("config", "counting", "store"),
    ("checksums", "formatting", "leases", "limbo", "slots", "tables", "wire"),
    ("messages", "retention", "sessions", "siblings"),
    ("admission", "asking", "filerows", "metafile", "recording", "scoring"),
    ("filetables", "miniature"),
    ("arena", "device", "extents", "ledger", "metadata", "protocol", "runs"),
    ("flushing", "payload"),
    ("wiping",),
    ("modes", "roster", "salvaging"),
    ("readers", "readers.base"),
    ("readers.arenas", "readers.hanging", "readers.landing", "readers.planning", "readers.probe"),
    ("readers.ahead",),
    ("readers.host",),
    ("readers.cufile", "readers.staged"),
    ("readers.select",),
    ("match", "upload"),
    ("devicestates",),
    ("core", "sources"),
    ("enrolling", "metering", "quotas", "ranking", "using"),
    ("choosing", "sharing"),
    ("evicting", "listing", "matching", "opening", "pinning"),
    ("retaining",),
    ("reserving", "tenancy", "usage"),
    ("doomed", "erasing", "moving", "pacing", "parting", "putting", "snapshot", "subject"),
    ("advising", "beginning", "covering", "filecheck", "scanning", "wasting"),
    ("survivors",),
    ("accounting", "proving", "rebuild"),
    ("check", "scrubbing"),
    ("verdicts",),
    ("mending",),
    ("repair",),
    ("draining", "localput", "spool"),
    ("drafts",),
    ("fileblocks", "members", "purging"),
    ("drafting", "filerecovery"),
    ("files",),
    ("namespace",),
    ("warehouse",),
    ("shared",),
    ("permitting",),
    ("answers", "greeting"),
    ("connection",),
    ("server",),
    ("channel", "remote"),
    ("link",),
    ("holding",),
    ("client",),
    ("chainfile",),
    ("describing", "importing"),
    ("nodes",),
    ("tree",),
    ("__init__",),
    ("engines",),
    ("engines.attaching", "engines.breakeven", "engines.identity", "engines.requests"),
    ("engines.finding", "engines.keyed"),
    (
        "engines.transfers",
        "engines.vllm_layout",
        "engines.vllm_offers",
        "engines.vllm_prefill",
        "engines.vllm_requests",
    ),
    ("engines.vllm_orders",),
    (
        "engines.lmcache",
        "engines.sglang",
        "engines.transformers",
        "engines.vllm",
        "engines.vllm_tier",
    ),
    ("engines.sglang_linker",),
)
RANKS = {module: rank for rank, line in enumerate(LAYERS) for module in line}

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


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which import nothing when run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imports_of(path: Path) -> Iterator[str]:
    """Modules of twfs that the file at *path* imports, wherever in it, without the `twfs.`."""
    for node in runtime_nodes(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{ast.unparse(node)}: write the whole name"
            # `from twfs import slots` imports a module, `from twfs.slots import Slots` a name.
            names = [
                f"{node.module}.{alias.name}" if is_package(node.module) else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from (name.removeprefix("twfs.") for name in names if name.startswith("twfs."))


def is_package(module: str | None) -> bool:
    return module is not None and (ROOT / module.replace(".", "/")).is_dir()


def module_of(path: Path) -> str:
    """`readers.host` of twfs/readers/host.py, `readers` of its __init__.py."""
    name = ".".join(path.relative_to(ROOT / "twfs").with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_module_imports_only_from_lower_layers(path: Path) -> None:
    module = module_of(path)
    assert module in RANKS, f"{module} is in no layer: add it to LAYERS in tests/test_tidy.py"
    for name in imports_of(path):
        assert name in RANKS, f"{name} is in no layer: add it to LAYERS in tests/test_tidy.py"
        assert RANKS[name] < RANKS[module], f"{module} imports {name}, which is not below it"


def test_layers_name_every_module_once() -> None:
    names = [module for line in LAYERS for module in line]
    assert sorted(names) == sorted(set(names))


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
    seen = [node.names[0].name for node in runtime_nodes(tree) if isinstance(node, ast.Import)]
    assert seen == ["b"]
