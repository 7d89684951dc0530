"""What the tables say at one moment, in columns: for the checker and for repair.

A million blocks are arrays of numbers here, not a million objects. Rows are in the order of their
keys; what cannot be read is set aside, with the reason. Nothing here looks at a device. Blocks.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from twfs.index.slots import KEY_BYTES, IntArray
from twfs.layout import GroupKind, Layout
from twfs.metadata import ledger
from twfs.metadata.sessions import Session, SessionKey
from twfs.metadata.tables import (
    LENGTH,
    LIMBO,
    MODEL_KEY,
    PLACE_KEY,
    UNREADABLE,
    ModelRecord,
    ReadView,
)
from twfs.records import (
    BLOCK_DTYPE,
    BLOCK_FIXED,
    BLOCK_KEY,
    EXTENT,
    FLAG_DETACHED,
    FLAG_HOLE,
    Block,
    BlockKey,
)
from twfs.secret import SECRET_BYTES
from twfs.units import ALIGN, EXTENTS_MAX, HASH_BYTES, KEY_BYTES_MAX, ModelId, PrefixHash

# Strings of fixed length: they are ordered as LMDB orders them, and compare as a whole.
KEY_DTYPE: Final = np.dtype(f"S{KEY_BYTES}")
PAIR_DTYPE: Final = np.dtype(f"S{KEY_BYTES + HASH_BYTES}")  # parent's key, child's prefix hash
HEAD_DTYPE: Final = np.dtype(f"S{MODEL_KEY.size + HASH_BYTES}")
RUN_DTYPE: Final = np.dtype(
    [("row", "<i8"), ("device", "<i8"), ("offset", "<i8"), ("length", "<i8")]
)
NUMBER_MAX: Final = 1 << 62  # what is larger is damage; sums of two still fit an int64
COUNTERS: Final = ("generation", "ino", "model")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that cannot be read: where it is, and why."""

    table: str
    key: bytes
    value: bytes
    text: str


def joined(*columns: IntArray) -> bytes:
    """The bytes of rows of *columns* (uint8, two dimensions) side by side."""
    return np.concatenate(columns, axis=1).tobytes()


def is_in(wanted: IntArray, among: IntArray) -> IntArray:
    """Tell which of *wanted* are in *among*, which is sorted."""
    if not len(among):
        return np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return np.asarray(among[at] == wanted)


@dataclass
class Snapshot:
    """All tables; *keys* (KEY_DTYPE) and *rows* (BLOCK_DTYPE) belong together, sorted by key.

    *tails* has what of a record follows its first extent, by row, where there is something. Runs
    are RUN_DTYPE with their place in the table as row. What is derived is computed once.
    """

    keys: IntArray
    rows: IntArray
    tails: dict[int, bytes]
    children: IntArray  # PAIR_DTYPE, sorted
    heads: IntArray  # HEAD_DTYPE, sorted
    models: dict[ModelId, ModelRecord]
    names: dict[str, ModelId]
    free: IntArray
    limbo: IntArray
    retired: IntArray  # of limbo: whether it is never used again
    counters: dict[str, int]
    roster_sequence: int = 0
    sessions: dict[SessionKey, Session] = field(default_factory=dict)
    ends: frozenset[bytes] = frozenset()  # packed keys of that table
    unreadable: list[Unreadable] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> BlockKey:
        """The full name of one block."""
        return BlockKey.unpack(self.keys[row : row + 1].tobytes())

    def block(self, row: int) -> Block:
        """The record of one block."""
        return Block.unpack(self.rows[row : row + 1].tobytes() + self.tails.get(row, b""))

    def name(self, row: int) -> str:
        """The prefix hash of one block, for a person."""
        return self.key(row).prefix_hash.hex()

    def layout(self, model: int) -> Layout | None:
        """The layout of a model, if that is there."""
        record = self.models.get(ModelId(model))
        return None if record is None else record.layout

    def own_key(self, row: int) -> bytes:
        """The engine's own key of one block, empty where it has none."""
        length = int(self.rows["key_bytes"][row])
        return self.tails[row][-length:] if length else b""

    @cached_property
    def key_bytes(self) -> IntArray:
        """The keys as rows of bytes."""
        return self.keys.view(np.uint8).reshape(len(self.keys), KEY_BYTES)

    @cached_property
    def model(self) -> IntArray:
        """Number of the model."""
        models = np.ascontiguousarray(self.key_bytes[:, :4]).view(">u4")
        return np.asarray(models.reshape(-1).astype(np.int64))

    @cached_property
    def group(self) -> IntArray:
        """Index of the group."""
        return np.asarray(self.key_bytes[:, 20].astype(np.int64))

    @cached_property
    def shard(self) -> IntArray:
        """Index of the shard."""
        shards = np.ascontiguousarray(self.key_bytes[:, 21:]).view(">u2")
        return np.asarray(shards.reshape(-1).astype(np.int64))

    @cached_property
    def prefix_hash(self) -> IntArray:
        """The prefix hashes, as strings of 16."""
        return self._hashes(np.ascontiguousarray(self.key_bytes[:, 4:20]))

    @cached_property
    def parent(self) -> IntArray:
        """The parents' prefix hashes, as strings of 16."""
        return self._hashes(np.ascontiguousarray(self.rows["parent"]).view(np.uint8))

    @staticmethod
    def _hashes(columns: IntArray) -> IntArray:
        return np.frombuffer(columns.tobytes(), f"S{HASH_BYTES}")

    @cached_property
    def hole(self) -> IntArray:
        """Whether the bytes were lost."""
        return np.asarray((self.rows["flags"] & FLAG_HOLE) != 0)

    @cached_property
    def detached(self) -> IntArray:
        """Whether a block before it has not come yet, as the record says."""
        return np.asarray((self.rows["flags"] & FLAG_DETACHED) != 0)

    @cached_property
    def known(self) -> IntArray:
        """Whether the model is there."""
        return np.isin(self.model, np.array(list(self.models), np.int64))

    @cached_property
    def linked(self) -> IntArray:
        """Whether it hangs below a parent: its model is known, and it starts no chain."""
        linked = self.known & (self.rows["parent"] != np.void(ledger.NO_PARENT))
        for record in self.models.values():
            first = (self.rows["position"] == record.layout.block_tokens) & (
                self.rows["key_bytes"] == 0
            )
            linked &= ~(first & (self.model == record.id))
        return np.asarray(linked)

    @cached_property
    def full(self) -> IntArray:
        """Whether it is of a full group of its layout."""
        full = np.zeros(len(self), np.bool_)
        for record in self.models.values():
            for number, group in enumerate(record.layout.groups):
                if group.kind is GroupKind.FULL:
                    full |= (self.model == record.id) & (self.group == number)
        return full

    @cached_property
    def parent_keys(self) -> IntArray:
        """The key that the parent of each has, be it there or not; KEY_DTYPE."""
        keys = self.key_bytes.copy()
        keys[:, 4:20] = np.ascontiguousarray(self.rows["parent"]).view(np.uint8).reshape(-1, 16)
        return keys.view(KEY_DTYPE).reshape(-1)

    @cached_property
    def parent_row(self) -> IntArray:
        """The row of the parent, -1 where there is none or it has not come."""
        if not len(self):
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.keys, self.parent_keys), len(self) - 1)
        return np.where((self.keys[at] == self.parent_keys) & self.linked, at, -1)

    @cached_property
    def _top(self) -> IntArray:
        """Where one arrives on the way up from each: the highest that is there, or in a ring."""
        here = np.arange(len(self))
        up = np.where(self.parent_row < 0, here, self.parent_row)
        for _ in range(len(self).bit_length() + 1):  # each round doubles the way
            higher = up[up]
            if (higher == up).all():
                break
            up = higher
        return np.asarray(up)

    @cached_property
    def highest(self) -> IntArray:
        """The first block that is there on the way up from each; -1 where the way is a ring."""
        if not len(self):
            return self._top
        return np.where(self.parent_row[self._top] < 0, self._top, -1)

    @cached_property
    def in_ring(self) -> IntArray:
        """Whether it is its own ancestor."""
        ring = np.zeros(len(self), np.bool_)
        # Far enough up from what is caught below or in a ring lies each of its members.
        ring[self._top[self.highest < 0]] = True
        return ring

    @cached_property
    def extents(self) -> IntArray:
        """Every extent of every block, RUN_DTYPE."""
        rows = np.flatnonzero(self.rows["extent_count"] > 0)
        first = np.zeros(len(rows), RUN_DTYPE)
        first["row"] = rows
        first["device"] = self.rows["device"][rows]
        first["offset"] = bounded(self.rows["offset"][rows])
        first["length"] = self.rows["units"][rows].astype(np.int64) * ALIGN
        more = [
            (row, *_extent(self.tails[row], at))
            for row in np.flatnonzero(self.rows["extent_count"] > 1).tolist()
            for at in range(int(self.rows["extent_count"][row]) - 1)
        ]
        return np.concatenate([first, np.array(more, RUN_DTYPE)]) if more else first

    def meant_children(self) -> IntArray:
        """The pairs of parent and child that the blocks mean; PAIR_DTYPE, sorted."""
        linked = self.linked
        parents = self.parent_keys[linked].view(np.uint8).reshape(-1, KEY_BYTES)
        pairs = np.frombuffer(joined(parents, self.key_bytes[linked][:, 4:20]), PAIR_DTYPE)
        return np.sort(pairs)

    def meant_heads(self, detached: IntArray) -> IntArray:
        """The heads that the blocks mean, *detached* telling which are; HEAD_DTYPE, sorted."""
        heads = [np.zeros(0, HEAD_DTYPE)]
        for record in self.models.values():
            mine = self.model == record.id
            standing = np.zeros(0, np.int64)
            for number, (group, shard) in enumerate(ledger.required(record.layout)):
                found = np.flatnonzero(mine & (self.group == group) & (self.shard == shard))
                if not number:  # the spine's: they stand for their prefix hashes
                    standing = found
                else:
                    there = is_in(self.prefix_hash[standing], self.prefix_hash[found])
                    standing = standing[there]
            inner = np.sort(self.parent[standing[self.linked[standing]]])
            ends = standing[~is_in(self.prefix_hash[standing], inner) & ~detached[standing]]
            packed = joined(self.key_bytes[ends][:, :20])
            heads.append(np.frombuffer(packed, HEAD_DTYPE))
        return np.sort(np.concatenate(heads))

    def meant_detached(self) -> IntArray:
        """Which blocks are detached, going by their parents all the way up."""
        if not len(self):
            return np.zeros(0, np.bool_)
        return np.asarray(
            self.full & self.linked & ((self.highest < 0) | self.linked[self.highest])
        )

    def meant_names(self) -> dict[str, ModelId]:
        """Which model each name leads to: the newest epoch."""
        newest = sorted(self.models.values(), key=lambda record: (record.epoch, record.id))
        return {record.name: record.id for record in newest}


def bounded(numbers: IntArray) -> IntArray:
    """Unsigned numbers as signed ones, with what is beyond all sense made NUMBER_MAX."""
    return np.minimum(numbers, np.uint64(NUMBER_MAX)).astype(np.int64)


def _extent(tail: bytes, at: int) -> tuple[int, int, int]:
    """Device, offset and length of an extent behind the first."""
    offset, units, device, _ = EXTENT.unpack_from(tail, at * EXTENT.size)
    return device, min(offset, NUMBER_MAX), units * ALIGN


def take_snapshot(view: ReadView) -> Snapshot:
    """Read all tables; what cannot be unpacked is set aside, not raised."""
    aside: list[Unreadable] = []
    keys, rows, tails = _blocks(view, aside)
    models, names = _models(view, aside)
    free, _ = _runs(view, "free", LENGTH, aside)
    limbo, flags = _runs(view, "limbo", LIMBO, aside)
    return Snapshot(
        keys, rows, tails, _keys(view, "children", PAIR_DTYPE, aside),
        _keys(view, "heads", HEAD_DTYPE, aside), models, names, free, limbo,
        np.array([bool(flag) for flag in flags], np.bool_), _counters(view, aside),
        _sequence(view, aside), _sessions(view, aside),
        frozenset(key for key, _ in view.raw("ends")), aside,
    )  # fmt: skip


def _blocks(view: ReadView, aside: list[Unreadable]) -> tuple[IntArray, IntArray, dict[int, bytes]]:
    """The records: keys, fixed parts with the first extent, and what follows."""
    keys, rows, tails = bytearray(), bytearray(), {}
    size, count = BLOCK_DTYPE.itemsize, 0
    for key, value in view.all_blocks():
        if len(key) != KEY_BYTES or len(value) < size:
            aside.append(_why_not("blocks", key, value))
            continue
        if len(value) > size:
            tails[count] = value[size:]
        keys += key
        rows += value[:size]
        count += 1
    found = np.frombuffer(bytes(rows), BLOCK_DTYPE)
    names = np.frombuffer(bytes(keys), KEY_DTYPE)
    good = _may_be_read(found, tails)
    if good.all():
        return names, found, tails
    for row in np.flatnonzero(~good).tolist():
        value = found[row : row + 1].tobytes() + tails.get(row, b"")
        aside.append(_why_not("blocks", names[row : row + 1].tobytes(), value))
    return (names[good], found[good], shifted(tails, good))


def shifted(tails: Mapping[int, bytes], kept: IntArray) -> dict[int, bytes]:
    """*tails* by the numbers that rows have when only those *kept* are left."""
    number = np.cumsum(kept) - 1
    return {int(number[row]): tail for row, tail in tails.items() if kept[row]}


def _why_not(table: str, key: bytes, value: bytes) -> Unreadable:
    """Say why a block's record cannot be read."""
    text = ""
    try:
        BlockKey.unpack(key)
        Block.unpack(value)
    except ValueError as error:
        text = str(error)
    return Unreadable(table, key, value, f"{key.hex()}: {text}")


def _may_be_read(rows: IntArray, tails: Mapping[int, bytes]) -> IntArray:
    """Tell which records Block.unpack takes."""
    length = np.full(len(rows), BLOCK_DTYPE.itemsize, np.int64)
    if tails:
        length[list(tails)] += [len(tail) for tail in tails.values()]
    count = rows["extent_count"].astype(np.int64)
    hole = (rows["flags"] & FLAG_HOLE) != 0
    wanted = BLOCK_FIXED.size + np.maximum(count, 1) * EXTENT.size + rows["key_bytes"]
    good = (count <= EXTENTS_MAX) & ((count == 0) == hole) & (rows["key_bytes"] <= KEY_BYTES_MAX)
    good &= length == wanted
    good &= hole | ((rows["offset"] % ALIGN == 0) & (rows["units"] > 0))
    for row in np.flatnonzero(good & (count > 1)).tolist():
        try:
            Block.unpack(rows[row : row + 1].tobytes() + tails[row])
        except ValueError:
            good[row] = False
    return np.asarray(good)


def _keys(view: ReadView, table: str, dtype: "np.dtype[Any]", aside: list[Unreadable]) -> IntArray:
    """All (key and value) of a table whose values, if any, are part of the name."""
    found = bytearray()
    size = KEY_BYTES if table == "children" else dtype.itemsize
    for key, value in view.raw(table):
        if (len(key), len(value)) == (size, dtype.itemsize - size):
            found += key
            found += value
        else:
            text = f"{table}: a key of {len(key)} and a value of {len(value)} bytes"
            aside.append(Unreadable(table, key, value, text))
    return np.frombuffer(bytes(found), dtype)


def _models(
    view: ReadView, aside: list[Unreadable]
) -> tuple[dict[ModelId, ModelRecord], dict[str, ModelId]]:
    """The models that can be read, and where the names lead."""
    models: dict[ModelId, ModelRecord] = {}
    names: dict[str, ModelId] = {}
    for key, value in view.raw("models"):
        try:
            number = ModelId(MODEL_KEY.unpack(key)[0])
            models[number] = ModelRecord.unpack(number, value)
        except UNREADABLE as why:
            aside.append(Unreadable("models", key, value, f"model {key.hex()}: {why!r}"))
    for key, value in view.raw("names"):
        try:
            names[key.decode()] = ModelId(MODEL_KEY.unpack(value)[0])
        except (ValueError, struct.error) as why:
            aside.append(Unreadable("names", key, value, f"name {key!r}: {why}"))
    return models, names


def _runs(
    view: ReadView, table: str, packed: struct.Struct, aside: list[Unreadable]
) -> tuple[IntArray, list[int]]:
    """The runs of "free" or "limbo", and the last number of each value."""
    runs: list[tuple[int, int, int, int]] = []
    last: list[int] = []
    for key, value in view.raw(table):
        if len(key) != PLACE_KEY.size or len(value) != packed.size:
            text = f"{table}: a key of {len(key)} and a value of {len(value)} bytes"
            aside.append(Unreadable(table, key, value, text))
            continue
        (device, offset), numbers = PLACE_KEY.unpack(key), packed.unpack(value)
        if offset % ALIGN or numbers[0] % ALIGN or not 0 < numbers[0] <= NUMBER_MAX >= offset:
            text = f"{table}: {numbers[0]} bytes at {offset} of device {device} are no run"
            aside.append(Unreadable(table, key, value, text))
            continue
        runs.append((len(runs), device, offset, numbers[0]))
        last.append(numbers[-1])
    return np.array(runs, RUN_DTYPE), last


def _sessions(view: ReadView, aside: list[Unreadable]) -> dict[SessionKey, Session]:
    """The sessions that can be read."""
    found = {}
    for key, value in view.raw("sessions"):
        try:
            found[SessionKey.unpack(key)] = Session.unpack(value)
        except ValueError as why:
            aside.append(Unreadable("sessions", key, value, f"session {key!r:.80}: {why}"))
    return found


def take_enrolled(view: ReadView) -> Snapshot:
    """Read only what the roster has to agree with: models, names, its sequence."""
    models, names = _models(view, [])
    none = np.zeros(0, RUN_DTYPE)
    return Snapshot(
        np.zeros(0, KEY_DTYPE), np.zeros(0, BLOCK_DTYPE), {}, np.zeros(0, PAIR_DTYPE),
        np.zeros(0, HEAD_DTYPE), models, names, none, none, np.zeros(0, np.bool_), {},
        _sequence(view, []),
    )  # fmt: skip


def _counters(view: ReadView, aside: list[Unreadable]) -> dict[str, int]:
    """The counters; 0 for one that cannot be read, so that it is below what is in use."""
    found = dict.fromkeys(COUNTERS, 0)
    for key, value in view.raw("counters"):
        name = key.decode(errors="replace")
        if len(value) != LENGTH.size:
            aside.append(Unreadable("counters", key, value, f"counter {name}: {len(value)} bytes"))
        elif name in found:
            found[name] = int(LENGTH.unpack(value)[0])
    return found


def _sequence(view: ReadView, aside: list[Unreadable]) -> int:
    """The sequence of the roster that the metadata agrees with; the secret is looked at too."""
    secret = view.meta("secret") or b""
    if len(secret) != SECRET_BYTES:
        aside.append(Unreadable("meta", b"secret", secret, f"secret: {len(secret)} bytes"))
    value = view.meta("roster") or b""
    if len(value) != LENGTH.size:
        aside.append(Unreadable("meta", b"roster", value, f"roster: {len(value)} bytes"))
        return 0
    return int(LENGTH.unpack(value)[0])


def pair_of(packed: IntArray, number: int) -> tuple[BlockKey, PrefixHash]:
    """Parent and child of one of the pairs *packed* (PAIR_DTYPE)."""
    data = packed[number : number + 1].tobytes()
    return BlockKey.unpack(data[:KEY_BYTES]), PrefixHash(data[KEY_BYTES:])


def head_of(packed: IntArray, number: int) -> tuple[ModelId, PrefixHash]:
    """Model and prefix hash of one of the heads *packed* (HEAD_DTYPE)."""
    data = packed[number : number + 1].tobytes()
    return ModelId(MODEL_KEY.unpack_from(data)[0]), PrefixHash(data[MODEL_KEY.size :])


assert BLOCK_KEY.size == KEY_BYTES
