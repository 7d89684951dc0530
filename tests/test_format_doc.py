"""FORMAT.md is true: its byte tables are the structs, its test vectors and invariants the code's.

The tables are parsed, not searched for: a changed offset, size, code or sentence fails.
"""

import inspect
import re
import struct
from pathlib import Path

import pytest

import twfs
from twfs import records
from twfs.checking import invariants
from twfs.checksums import lanes_of, xxh3_of
from twfs.layout import Group, Layout
from twfs.metadata import filerows
from twfs.metadata.tables import TABLES
from twfs.prefix import Chain, Names, OwnKey, Root, names_of_keys, root_of
from twfs.records import BLOCK_DTYPE, EXTENT, LAYER_SUMS_MAX, SUM
from twfs.secret import MAC_BYTES
from twfs.units import ALIGN, EXTENTS_MAX, NAME_BYTES_MAX

DOCUMENT = Path(next(iter(twfs.__path__)), "FORMAT.md").read_text()
RECORDS = (
    "SUPERBLOCK", "ROSTER", "EXTENT", "HEADER", "BLOCK_KEY", "BLOCK_FIXED", "SESSION", "FILE_ROW",
    "FILE_KEY",
)  # fmt: skip
SEALED = ("SUPERBLOCK", "HEADER")  # padded to 4 KiB, with a sum in the last 8 bytes
INVARIANT = re.compile(r"^\| I(\d+) \| (.+) \|$", re.MULTILINE)


def struct_of(name: str) -> struct.Struct:
    """The struct that the table *name* is of."""
    found: struct.Struct = getattr(filerows if name.startswith("FILE_") else records, name)
    return found


def rows_of(heading: str) -> list[tuple[int, int, str, str]]:
    """Offset, size, code and field of every row of the table below *heading*."""
    (section,) = re.findall(rf"^### {heading}\n(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \| (\w+) \| .+ \|$", section, re.MULTILINE)
    return [(int(offset), int(size), code, field) for offset, size, code, field in found]


@pytest.mark.parametrize("name", RECORDS)
def test_byte_tables_have_no_gap_and_true_sizes(name: str) -> None:
    rows = rows_of(name)
    assert rows
    end = 0
    for offset, size, code, field in rows:
        assert offset == end, field
        assert size == struct.calcsize("<" + code), field
        end = offset + size
    assert end == (ALIGN if name in SEALED else struct_of(name).size)


@pytest.mark.parametrize("name", RECORDS)
def test_codes_joined_are_the_struct(name: str) -> None:
    packed = struct_of(name)
    codes = "".join(code for offset, _, code, _ in rows_of(name) if offset < packed.size)
    assert packed.format[1:] == codes
    assert packed.format[0] == (">" if name == "BLOCK_KEY" else "<")


def test_what_follows_the_structs_is_as_long_as_the_limits_say() -> None:
    tail = [
        (code, field) for offset, _, code, field in rows_of("HEADER")
        if offset >= records.HEADER.size
    ]  # fmt: skip
    assert [field for _, field in tail] == [
        "name", "extents", "layer_sums", "reserved", "mac", "sum",
    ]  # fmt: skip
    sizes = {field: struct.calcsize("<" + code) for code, field in tail}
    assert sizes["name"] == NAME_BYTES_MAX
    assert sizes["extents"] == EXTENTS_MAX * EXTENT.size
    assert sizes["layer_sums"] == LAYER_SUMS_MAX * SUM.size
    assert sizes["mac"] == MAC_BYTES
    assert {field: at for at, _, _, field in rows_of("HEADER")}["mac"] == records.MAC_OFFSET
    for name in SEALED:
        assert rows_of(name)[-1] == (ALIGN - SUM.size, SUM.size, SUM.format[1:], "sum")


def test_fields_of_block_records_are_those_of_the_array_type() -> None:
    rows = rows_of("BLOCK_FIXED")
    assert BLOCK_DTYPE.fields is not None
    for offset, size, _, field in rows:
        dtype, at = BLOCK_DTYPE.fields[field][:2]
        assert (at, dtype.itemsize) == (offset, size), field


def own_names(root: Root) -> Names:
    return names_of_keys(root, [OwnKey(b"key-0", None, 16), OwnKey(b"key-1", b"key-0", 32)])


def test_vectors_are_what_the_code_computes() -> None:
    layout = Layout("example/model", (Group(layers=2, kv_heads=2, head_size=4),), 16)
    root, salted = root_of(layout.fingerprint, 0), root_of(layout.fingerprint, 7, b"salt")
    meant: dict[str, object] = {
        "layout.fingerprint": layout.fingerprint.hex(),
        "root.hash": root.prefix_hash.hex(),
        "root.digest": root.digest.hex(),
        "salted.hash": salted.prefix_hash.hex(),
        "salted.digest": salted.digest.hex(),
    }
    chain = Chain(root, 16).extend(range(32)).names()
    extra = Chain(root, 16).extend(range(32), [b"", b"lora-a"]).names()
    own = own_names(root)
    for name, names, indices in (
        ("chain", chain, (0, 1)),
        ("extra", extra, (1,)),
        ("own", own, (0, 1)),
    ):
        for index in indices:
            meant[f"{name}.{index}.hash"] = names.hash_at(index).hex()
            meant[f"{name}.{index}.digest"] = names.digests[32 * index :][:32].hex()
    meant["own.1.parent"] = own.parents[16:].hex()
    for name, payload in (("A", bytes(range(10))), ("B", b"\xff" * 4104)):
        plain, weighted = lanes_of(payload)
        meant[f"payload.{name}.xxh3"] = xxh3_of(payload).hex()
        meant[f"payload.{name}.plain"] = plain
        meant[f"payload.{name}.weighted"] = weighted
    shown = dict(re.findall(r"^\| ([a-zA-Z]+\.[\w.]+) \| `(\w+)` \|$", DOCUMENT, re.MULTILINE))
    assert shown == {name: str(value) for name, value in meant.items()}
    assert f"\n{layout.canonical().decode()}\n" in DOCUMENT


def test_every_table_of_the_metadata_is_described() -> None:
    (section,) = re.findall(r"^## The metadata\n(.*?)^###", DOCUMENT, re.MULTILINE | re.DOTALL)
    described = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(described) == sorted({*TABLES, "children"})


def test_invariants_are_the_checkers_word_by_word() -> None:
    sentences = {int(number): text for number, text in INVARIANT.findall(DOCUMENT)}
    assert list(sentences) == list(range(1, len(sentences) + 1))
    for number, function in invariants.INVARIANTS.items():
        first = (inspect.getdoc(function) or "").split(". ")[0].split(".\n")[0].rstrip(".")
        assert first == f"I{number}: {sentences[number]}"


def test_every_invariant_that_is_not_of_one_state_names_the_tests_that_hold_it() -> None:
    there = {
        name
        for path in Path(__file__).parent.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = {
        int(number): re.findall(r"`(test_\w+)`", text)
        for number, text in re.findall(r"^\* I(\d+): (.+)$", DOCUMENT, re.MULTILINE)
    }
    numbers = {int(number) for number, _ in INVARIANT.findall(DOCUMENT)}
    assert named.keys() == numbers - invariants.INVARIANTS.keys()
    for number, names in named.items():
        assert names, number
        assert set(names) <= there, number


def test_code_refers_only_to_invariants_that_exist() -> None:
    known = {int(number) for number, _ in INVARIANT.findall(DOCUMENT)}
    root = Path(__file__).parent.parent
    for folder in ("twfs", "mount", "tools", "tests"):
        for path in (root / folder).rglob("*.py"):
            for number in re.findall(r"\binvariant I(\d+)\b|\bI(\d+) of FORMAT", path.read_text()):
                assert int(number[0] or number[1]) in known, path
