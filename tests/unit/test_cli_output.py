"""Sizes, JSON and tables: what the tools print means one thing, and reads back as it was."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest

from twfs.errors import InvalidInput
from twfs.store import Retention, Space
from twfs.units import ByteCount
from twfs_tools.output import age, parse_size, print_json, print_table, size
from twfs_tools.status import flat

BAD_SIZES = ["", "G", "-1", "1X", "1 2", "64GG", "1e3", "ten", "1.5.2M", "0x10", "inf", "1KiBs"]


@pytest.mark.parametrize(
    ("text", "byte_count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1024),
        ("64G", 64 << 30),
        ("64GiB", 64 << 30),
        ("64gb", 64 << 30),
        (" 2 MiB ", 2 << 20),
        ("1.5T", 3 << 39),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_binary_and_exact(text: str, byte_count: int) -> None:
    assert parse_size(text) == byte_count


@pytest.mark.parametrize("text", BAD_SIZES)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("byte_count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 39, "1.5 TiB"),
        (1 << 73, "8192.0 EiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(byte_count: int, text: str) -> None:
    assert size(byte_count) == text


def test_an_age_in_the_future_is_no_age() -> None:
    assert age(1 << 60) == "0 s ago"


def test_json_holds_exact_values_of_our_types(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [ByteCount(number) for number in (1 << 60, 1, 2, 3, 4)]
    identity = uuid.uuid4()
    print_json({
        "space": Space(*numbers), "hash": b"\x00\xff", "class": Retention.PINNED,
        "path": Path("/a b"), "uuid": identity, "numpy": np.uint64(2**64 - 1), "set": {2, 1},
    })  # fmt: skip
    assert json.loads(capsys.readouterr().out) == {
        "space": {
            "total_bytes": 1 << 60, "free_bytes": 1, "limbo_bytes": 2, "reserved_bytes": 3,
            "evictable_bytes": 4,
        },
        "hash": "00ff", "class": "pinned", "path": "/a b", "uuid": str(identity),
        "numpy": 2**64 - 1, "set": [1, 2],
    }  # fmt: skip


def test_a_type_without_json_form_is_a_bug_and_says_so() -> None:
    with pytest.raises(TypeError, match="no JSON form for object"):
        print_json(object())


def test_a_table_in_a_pipe_keeps_every_column_whole(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["x" * 40, "y" * 40, "z" * 40]
    print_table(("A", ">B", "C"), [wide])
    assert capsys.readouterr().out.splitlines()[1].split() == wide


def test_nested_statistics_become_dotted_names() -> None:
    nested = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "devices": [{"reads": 4}], "notes": ["n"]}
    assert list(flat(nested)) == [
        ("a", 1), ("b.c", 2), ("b.d.e", 3), ("devices.0.reads", 4), ("notes", ["n"]),
    ]  # fmt: skip
