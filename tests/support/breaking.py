"""Warehouses broken at random, in tables and on devices: what a repair has to mend.

`break_one` is deterministic in its numbers, so that Hypothesis can shrink what it finds.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support.filing import make_file
from support.warehouses import (
    HYBRID,
    MHA,
    chain_of,
    own_names,
    payload_of,
    put,
    put_whole,
    records_of,
)
from twfs.core.opening import META_DIRECTORY
from twfs.devices.payload import read_payload
from twfs.metadata.environment import Metadata
from twfs.metadata.filerows import FILE_KEY, row_of, tail_of
from twfs.metadata.tables import LENGTH, PLACE_KEY, WriteView
from twfs.records import DATA_START, ROSTER_STARTS, Block
from twfs.store import Model
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

Numbers = tuple[int, int, int]
# What `fill` writes into files, by name.
FILES: Final = {
    b"f%d" % number: random.Random(number).randbytes(number * 5000) for number in range(3)
}


def fill(warehouse: Warehouse) -> list[tuple[Model, list[bytes]]]:
    """Put chains with a branch, detached ones, own keys, and a model of three groups."""
    mha, hybrid = warehouse.open_model("m", MHA), warehouse.open_model("h", HYBRID)
    chains = [chain_of(mha, 6), chain_of(mha, 5, 1, fork=3), chain_of(mha, 9, 5).slice(7, 9)]
    for names in chains:
        put(warehouse, mha, names)
    put(warehouse, mha, own_names(mha, ("a", None, 0), ("b", "a", 0), ("c", "b", 7)))
    put_whole(warehouse, hybrid, chain_of(hybrid, 3))
    below = warehouse.files.mkdir(0, b"d", mode=0o755, uid=0, gid=0)
    for name, data in FILES.items():
        make_file(warehouse.files, below.ino, name, data)
    warehouse.files.rename(below.ino, b"f1", 0, b"f1")
    return [(mha, [n.hash_at(i) for n in chains for i in range(len(n))])]


def assert_payloads(warehouse: Warehouse) -> None:
    """Fail unless every block that is whole has the bytes that `fill` gave to its name."""
    for key, block in records_of(warehouse._core).items():
        if block.hole:
            continue
        layout = warehouse._core.models[key.model].layout
        _, payload = read_payload(warehouse.devices, key, block, lanes=True)
        if layout.any_length(key.group):
            assert_block_of_file(block, bytes(payload))
        else:
            meant = payload_of(layout, key.prefix_hash, key.group, key.shard)
            assert bytes(payload) == meant.tobytes()


def assert_block_of_file(block: Block, payload: bytes) -> None:
    """Fail unless *payload* is the row that belongs to *block*, behind its file's bytes."""
    ino, index, version, has_row = FILE_KEY.unpack(block.key)
    row = row_of(payload)  # all files of `fill` have one piece, so that every block has a row
    data = b"" if row.is_directory else FILES[row.name]
    assert (row.ino, row.version, row.size, has_row) == (ino, version, len(data), 1)
    assert row.name == b"d" if row.is_directory else index == (version > 0)
    assert payload == (b"" if index == row.blocks else data) + tail_of(row)


def _pick(view: WriteView, table: str, number: int) -> tuple[bytes, bytes] | None:
    """One of the pairs of a table."""
    pairs = list(view.raw(table))
    return pairs[number % len(pairs)] if pairs else None


def _flip(data: bytes, number: int, bits: int) -> bytes:
    """*data* with one byte changed."""
    changed = bytearray(data)
    changed[number % len(changed)] ^= 1 + bits % 255
    return bytes(changed)


def _change_value(table: str) -> Callable[[WriteView, Numbers], None]:
    def job(view: WriteView, numbers: Numbers) -> None:
        pair = _pick(view, table, numbers[0])
        if pair is not None and pair[1]:
            view.put_raw(table, pair[0], _flip(pair[1], numbers[1], numbers[2]))

    return job


def _change_key(table: str) -> Callable[[WriteView, Numbers], None]:
    def job(view: WriteView, numbers: Numbers) -> None:
        pair = _pick(view, table, numbers[0])
        if pair is not None:
            view.delete_raw(table, *pair if table == "children" else (pair[0],))
            key = _flip(pair[0], numbers[1], numbers[2])
            if table == "children":
                view.add_raw_child(key, pair[1])
            else:
                view.put_raw(table, key, pair[1])

    return job


def _delete(table: str) -> Callable[[WriteView, Numbers], None]:
    def job(view: WriteView, numbers: Numbers) -> None:
        pair = _pick(view, table, numbers[0])
        if pair is not None:
            view.delete_raw(table, *pair if table == "children" else (pair[0],))

    return job


def _double(view: WriteView, numbers: Numbers) -> None:
    """Another block gets the places and numbers of one."""
    one, other = (_pick(view, "blocks", number) for number in numbers[:2])
    if one is not None and other is not None and len(one[1]) == len(other[1]):
        view.put_raw("blocks", other[0], one[1])


def _garbage(view: WriteView, numbers: Numbers) -> None:
    """A record that is none, in a table of some kind."""
    table = ("blocks", "heads", "free", "limbo", "counters", "models", "names")[numbers[0] % 7]
    view.put_raw(
        table, bytes([1 + numbers[1] % 255]) * (1 + numbers[2] % 40), bytes(numbers[2] % 9)
    )


def _run(table: str) -> Callable[[WriteView, Numbers], None]:
    def job(view: WriteView, numbers: Numbers) -> None:
        """A run somewhere, over whatever is there."""
        offset = DATA_START + numbers[0] % 64 * ALIGN
        value = LENGTH.pack((1 + numbers[1] % 32) * ALIGN)
        if table == "limbo":
            value += LENGTH.pack(numbers[2] % 2)
        view.put_raw(table, PLACE_KEY.pack(numbers[2] % 9 // 8, offset), value)

    return job


def _counter(view: WriteView, numbers: Numbers) -> None:
    name = ("generation", "ino", "model")[numbers[0] % 3]
    view.set_counter(name, numbers[1] << (numbers[2] % 40))


IN_TABLES: Final[dict[str, Callable[[WriteView, Numbers], None]]] = {
    "record": _change_value("blocks"),
    "name of a block": _change_key("blocks"),
    "lost record": _delete("blocks"),
    "two in one place": _double,
    "child": _change_key("children"),
    "lost child": _delete("children"),
    "head": _change_key("heads"),
    "lost head": _delete("heads"),
    "free run": _change_value("free"),
    "place of a free run": _change_key("free"),
    "lost free run": _delete("free"),
    "free run anywhere": _run("free"),
    "limbo anywhere": _run("limbo"),
    "counter": _counter,
    "model": _change_value("models"),
    "lost model": _delete("models"),
    "name": _change_value("names"),
    "lost name": _delete("names"),
    "garbage": _garbage,
    "row of a file": _change_value("files"),
    "lost file": _delete("files"),
    "path": _change_key("paths"),
    "lost path": _delete("paths"),
}
ON_DEVICE: Final = ("header", "payload", "superblock", "roster")
KINDS: Final = (*IN_TABLES, *ON_DEVICE)


def break_one(directory: Path, kind: str, numbers: Numbers) -> None:
    """Break something of *kind* in the closed warehouse in *directory*."""
    metadata = Metadata.open(directory / META_DIRECTORY)
    try:
        if kind in IN_TABLES:
            metadata.submit(lambda view: IN_TABLES[kind](view, numbers)).result()
            return
        with metadata.read() as view:
            blocks = []
            for _, value in view.all_blocks():
                try:
                    blocks.append(Block.unpack(value))
                except ValueError:
                    continue
    finally:
        metadata.close()
    image = directory / "device0.img"
    size = image.stat().st_size
    whole = [block for block in blocks if block.extents and block.extents[0].offset < size // 2]
    first = int(whole[numbers[0] % len(whole)].extents[0].offset) if whole else DATA_START
    at = {
        "header": first + numbers[1] % ALIGN,
        "payload": first + ALIGN + numbers[1] % 64,
        "superblock": (0, size - ALIGN)[numbers[0] % 2] + numbers[1] % 80,
        "roster": ROSTER_STARTS[numbers[0] % 2] + numbers[1] % 200,
    }[kind]
    with image.open("r+b", buffering=0) as file:
        file.seek(at)
        before = file.read(1)
        file.seek(at)
        file.write(_flip(before, 0, numbers[2]))
