"""What is fuzzed: each target feeds bytes to the code behind one door, and says what may come out.

A target's `feed` ends for whatever bytes; an exception out of it is a bug, and so is a hang, memory
far beyond the input, or a change of the sample warehouse. Records behind a checksum are tried as
they are and with their checksum made right, so that the parser behind it is reached.
"""

import functools
import json
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec

from fuzz import mutating
from fuzz.sample import (
    EVERY_TABLE,
    Copy,
    change_tables,
    changed_tables,
    look_at_everything,
    rows_of_tables,
    sample_warehouse,
)
from fuzz.wire import feed_frames, feed_reply, feed_request, reply_seeds, request_seeds
from support.warehouses import LAYOUTS, MHA, chain_of, stop_tending
from twfs.checking.snapshot import take_snapshot
from twfs.config import parse
from twfs.core import opening
from twfs.devices.extents import Allocator
from twfs.devices.roster import Roster, RosterClass, RosterModel
from twfs.errors import CorruptMetadata, InvalidInput, TooLarge, TwfsError
from twfs.index.slots import Slots
from twfs.layout import Layout, check_model_name
from twfs.metadata.environment import Metadata
from twfs.metadata.sessions import Session, SessionKey
from twfs.policy.retention import Terms
from twfs.protocol.codec import layout_of, layout_to_json
from twfs.records import (
    FORMAT_VERSION,
    HEADER_MAGIC,
    ROSTER,
    ROSTER_MAGIC,
    SUM,
    SUPERBLOCK_MAGIC,
    Block,
    BlockKey,
    Header,
    Superblock,
    _seal,
)
from twfs.secret import mac_of
from twfs.store import ModelInfo
from twfs.units import ALIGN, Millis, ModelId, PrefixHash
from twfs.vfs.chainfile import ChainFile, parse_block_name, parse_detached_name, write_chain
from twfs.vfs.importing import Importer
from twfs.vfs.nodes import CONTROL, ROOT
from twfs.vfs.nodes import LAYOUTS as LAYOUTS_DIRECTORY
from twfs.vfs.tree import Tree
from twfs.warehouse import Warehouse
from twfs_mount.looking import text_of
from twfs_mount.main import mount_options
from twfs_tools.create import device_specs
from twfs_tools.output import parse_size
from twfs_tools.target import parse_hash

sample_copy = functools.cache(Copy)
Mutate = Callable[[random.Random, bytes], bytes]

SECRET: Final = bytes(range(32))
WAREHOUSE: Final = UUID(int=7)


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """One door: how to feed it, valid inputs to begin with, and how to spoil them."""

    feed: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate = mutating.mutated_bytes


def _sealed(data: bytes, magic: bytes) -> bytes:
    """*data* as 4 KiB that begin with *magic* and end with their sum."""
    return _seal((magic + data[len(magic) :])[: ALIGN - SUM.size])


def feed_superblock(data: bytes) -> None:
    """Unpack a superblock: ValueError, or sizes that can be."""
    for each in (data, _sealed(data, SUPERBLOCK_MAGIC)):
        with suppress(ValueError):
            found = Superblock.unpack(each)
            assert 0 < found.data_start < found.size_bytes
            assert Superblock.unpack(found.pack()) == found


def feed_header(data: bytes) -> None:
    """Unpack a header: ValueError, or one that can be packed again."""
    for each in (data, _sealed(data, HEADER_MAGIC)):
        for form in (each, memoryview(each)):
            try:
                found = Header.unpack(form)
            except ValueError:
                continue
            assert Header.unpack(found.pack(SECRET)) == found


def feed_record(data: bytes) -> None:
    """Unpack a block's key and record: ValueError, or what can be packed again."""
    with suppress(ValueError):
        key = BlockKey.unpack(data[:23])
        assert key.pack() == data[:23]
    with suppress(ValueError):
        block = Block.unpack(data)
        assert Block.unpack(block.pack()) == block


def feed_session(data: bytes) -> None:
    """Unpack a session's key and record: ValueError, or what can be packed again."""
    with suppress(ValueError):
        key = SessionKey.unpack(data)
        assert SessionKey.unpack(key.pack()) == key
    with suppress(ValueError):
        session = Session.unpack(data)
        assert session.pack() == data


def session_seeds() -> list[bytes]:
    """Keys and records of sessions with an id and without."""
    head = PrefixHash(bytes(range(16)))
    return [
        SessionKey.of(ModelId(1), 2, "agent-7").pack(),
        SessionKey.without_id(ModelId(1), 0, head).pack(), Session(head, 3, True, 1 << 40).pack(),
    ]  # fmt: skip


def feed_roster(data: bytes) -> None:
    """Unpack a roster: ValueError, or one that can be packed again.

    The input is the JSON, for nobody without the secret comes to it.
    """
    body = zlib.compress(data, 1)
    fixed = ROSTER.pack(ROSTER_MAGIC, FORMAT_VERSION, 0, WAREHOUSE.bytes, 7, len(body))
    packed = fixed + mac_of(SECRET, fixed + body) + body
    with suppress(ValueError, TooLarge):
        found = Roster.unpack(packed, SECRET, WAREHOUSE)
        assert all(0 <= row.retention <= 3 and len(row.head) == 16 for row in found.classes)
        again = Roster.unpack(found.pack(SECRET, WAREHOUSE), SECRET, WAREHOUSE)
        assert again.classes == found.classes


def roster_seeds() -> list[bytes]:
    """The JSON of a roster with a model and classes of sessions."""
    layout = next(iter(LAYOUTS.values()))
    head = PrefixHash(bytes(range(16)))
    roster = Roster(
        7, models=(RosterModel("m", 1, layout, Millis(9)),),
        classes=(RosterClass("m", 0, "agent-7", head, 3), RosterClass("m", 0, "", head, 0)),
    )  # fmt: skip
    return [json.dumps(roster._document()).encode()]


def feed_config(data: bytes) -> None:
    """Read settings: InvalidInput, or terms that can be used."""
    with suppress(InvalidInput):
        terms = Terms.of(parse(data))
        assert len(terms.shares) == len(terms.ttl_ms) == 4
        assert all(0 <= share <= 1 for share in terms.shares)


def config_seeds() -> list[bytes]:
    """Settings that say something of every class."""
    return [
        b"[retention.ephemeral]\nttl = '1h'\n[retention.standard]\nttl = 'never'\nshare = 0.5\n",
        b'[retention.durable]\nttl = "30d"\n[retention.pinned]\nshare = 0.25\n',
    ]


def feed_tables(data: bytes) -> None:
    """Read every table, with some rows of the sample replaced: CorruptMetadata and findings only.

    The input is msgpack: rows of [table, key, value], value nil to take the row out.
    """
    warehouse = sample_warehouse()
    core = warehouse._core
    rows = decoded_rows(data)
    with changed_tables(core.metadata, rows) as view:
        taken = take_snapshot(view)
        assert all(isinstance(each.text, str) for each in taken.unreadable)
        slots = Slots(core.directory / "heat")
        with suppress(CorruptMetadata):
            opening.load_slots(view, slots, 4096)
            for slot in range(min(len(slots), 4096)):
                slots.ancestors(slot)
        slots.close()
        areas = {device.index: device.data_area for device in core.devices.values()}
        with suppress(CorruptMetadata):
            Allocator(areas, view.runs("free"))
        for read in (
            lambda: list(view.leased_limbo()), view.models, lambda: list(view.all_heads()),
            lambda: [view.counter(name) for name in ("generation", "ino", "model")],
            lambda: [view.model_id(name) for name in LAYOUTS],
            lambda: [view.block(key) for key in map(taken.key, range(len(taken)))],
            lambda: [view.children(key) for key in map(taken.key, range(len(taken)))],
        ):  # fmt: skip
            with suppress(CorruptMetadata):
                read()


def feed_warehouse(data: bytes) -> None:
    """Commit such rows, open that warehouse, check it, ask it everything: TwfsError and findings.

    Bytes that a read delivers are those that were put: read_all compares them.
    """
    copy = sample_copy()
    copy.renew()
    rows = decoded_rows(data)
    metadata = Metadata.open(copy.directory / opening.META_DIRECTORY)
    try:
        metadata.submit(lambda view: change_tables(view, rows)).result()
    finally:
        metadata.close()
    with suppress(TwfsError), Warehouse.open(copy.directory) as warehouse:
        stop_tending(warehouse)
        look_at_everything(warehouse)


def decoded_rows(data: bytes) -> list[tuple[str, bytes, bytes | None]]:
    """The rows that an input of feed_tables stands for; none if it is no such input."""
    return [(EVERY_TABLE[hash_of(table)], key, value) for table, key, value in packed_rows(data)]


def packed_rows(data: bytes) -> list[tuple[str, bytes, bytes | None]]:
    """The rows in *data*, none if it is something else."""
    with suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return msgspec.msgpack.decode(data, type=list[tuple[str, bytes, bytes | None]])[:64]
    return []


def hash_of(table: str) -> int:
    """The table that a text names, or any."""
    return EVERY_TABLE.index(table) if table in EVERY_TABLE else len(table) % len(EVERY_TABLE)


def table_seeds() -> list[bytes]:
    """Every row of the sample, a few of one table in each seed."""
    with sample_warehouse()._core.metadata.read() as view:
        rows = rows_of_tables(view)
    seeds = []
    for table in EVERY_TABLE:
        mine = [row for row in rows if row[0] == table]
        seeds += [msgspec.msgpack.encode(mine[at : at + 4]) for at in range(0, len(mine), 4)]
    return seeds


def mutated_rows(chance: random.Random, data: bytes) -> bytes:
    """Spoil keys and values of some rows: as bytes, as JSON, or each other's."""
    rows = packed_rows(data)
    if not rows:
        return mutating.mutated_packed(chance, data)
    changed: list[tuple[str, bytes, bytes | None]] = []
    for table, key, value in rows:
        how = chance.random()
        if how < 0.5:
            changed.append((table, key, _spoilt(chance, value)))
        elif how < 0.65:
            changed.append((table, mutating.mutated_bytes(chance, key), value))
        elif how < 0.75:
            changed.append((table, key, chance.choice(rows)[2]))
        elif how < 0.8:
            changed += [(table, key, None), (table, chance.choice(rows)[1], value)]
        else:
            changed.append((table, key, None if how < 0.85 else value))
    return msgspec.msgpack.encode(changed)[: mutating.BYTES_MAX]


def _spoilt(chance: random.Random, value: bytes | None) -> bytes:
    """Another value for one."""
    if not value:
        return chance.randbytes(chance.choice((0, 1, 8, 16)))
    if value[:1] in b"[{":
        return mutating.mutated_json(chance, value)
    return mutating.mutated_bytes(chance, value)


def sample_model(name: str) -> ModelInfo:
    """A model of the sample warehouse."""
    return next(info for info in sample_warehouse().models() if info.name == name)


def feed_chain(data: bytes) -> None:
    """Parse and check a chain.json: InvalidInput only."""
    with suppress(InvalidInput):
        chain = ChainFile.parse(data)
        assert len(chain.files) <= len(chain.blocks)
        for name, head in chain_heads().items():
            with suppress(InvalidInput):
                chain.check(sample_model(name), head)


def chain_heads() -> dict[str, PrefixHash]:
    """The longest chain of some models of the sample."""
    found = {}
    for name, blocks in (("mha", 6), ("sharded", 3), ("hybrid", 2)):
        model = sample_warehouse().open_model(name)
        found[name] = chain_of(model, blocks).hash_at(blocks - 1)
    return found


def chain_seeds() -> list[bytes]:
    """What the mount shows for these."""
    warehouse, seeds = sample_warehouse(), []
    for name, head in chain_heads().items():
        model = sample_model(name)
        seeds.append(write_chain(model, head, warehouse.chain_of(model.id, head)))
    return seeds


def feed_layout(data: bytes) -> None:
    """Make a layout: InvalidInput, or one whose sizes are numbers and whose form is stable."""
    with suppress(InvalidInput):
        layout = layout_of(data)
        assert Layout.from_dict(layout.to_dict()) == layout
        assert len(layout.fingerprint) == 32
        for group in range(len(layout.groups)):
            assert type(layout.block_bytes(group)) is int
            assert 0 <= layout.summed_layers(group) <= 256
        assert layout.differences(MHA) is not None
        assert layout_of(layout_to_json(layout)) == layout


def feed_name(data: bytes) -> None:
    """Use bytes as every name, hash, size and option that a person or a program may give."""
    with suppress(TwfsError):
        name_in_tree(text_of(data))
    text = data.decode("utf-8", "surrogateescape")
    name_in_tree(text)
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: check_model_name(text), lambda: parse_size(text), lambda: parse_hash(text),
        lambda: mount_options([text]), lambda: mount_options([f"uid={text}"]),
        lambda: mount_options([f"file_mode={text}"]), lambda: mount_options([f"group={text}"]),
        lambda: device_specs(Path("/nowhere"), text, []),
        lambda: device_specs(Path("/nowhere"), None, [text]),
        lambda: sample_warehouse().open_model(text),
    )  # fmt: skip
    for attempt in attempts:
        with suppress(TwfsError, OSError):  # the command line makes one line of either
            attempt()
    for layout in LAYOUTS.values():
        parsed = parse_block_name(text, layout)
        assert parsed is None or (0 <= parsed[1] < len(layout.groups) and parsed[2] < layout.shards)
        parse_detached_name(text, layout)


def name_in_tree(text: str) -> None:
    """Look *text* up in a directory of every kind: one name for one thing, or NoSuchBlock."""
    warehouse = sample_warehouse()
    tree = Tree(warehouse, Importer(warehouse, warehouse._core.directory))
    model = sample_model("mha")
    head = chain_heads()["mha"]
    session = tree.session(model.id, head)
    for directory in (
        ROOT, CONTROL, LAYOUTS_DIRECTORY, tree.model_directory(model.id), session,
        tree.detached_directory(model.id),
    ):  # fmt: skip
        with suppress(TwfsError):
            node = tree.lookup(directory, text)
            tree.attributes(node)
            tree.described(node)
            names = {name for _, row in tree.rows(directory).since(0) if (name := row.name)}
            assert text in names or len(text) == 32, f"{text!r} is an alias"


def name_seeds() -> list[bytes]:
    """Names of things that are there, and what options look like."""
    heads = [head.hex() for head in chain_heads().values()]
    model = sample_model("mha").id
    detached = [key.prefix_hash.hex() + ".kv" for key in sample_warehouse().detached(model)]
    return [
        text.encode()
        for text in (
            *heads, *detached, "00000.kv", "00001.g0.s1.kv", "chain.json", ".twfs", "stats.json",
            "metrics", "layouts", "mha.json", "mha", "detached", "64G", "1.5TiB", "4096",
            "image:1G", "ro,allow_other,uid=1", "0640",
        )
    ]  # fmt: skip


def superblock_seeds() -> list[bytes]:
    """The sample's superblock."""
    (device,) = sample_warehouse()._core.devices.values()
    return [device.superblock.pack()]


def record_seeds() -> list[bytes]:
    """Some records of the sample."""
    with sample_warehouse()._core.metadata.read() as view:
        return [record for _, record in view.all_blocks()][::5]


def header_seeds() -> list[bytes]:
    """Headers of some of these, without and with layers, key and several extents."""
    seeds = []
    with sample_warehouse()._core.metadata.read() as view:
        records = [(BlockKey.unpack(k), Block.unpack(v)) for k, v in view.all_blocks()][::9]
    for key, block in records:
        for layers in (0, 3, 256):
            header = Header(
                UUID(int=1), UUID(int=2), bytes(range(32)), "a-model" * (layers % 4), 4, key.group,
                key.shard, key.prefix_hash, block, tuple(range(layers)),
            )  # fmt: skip
            if block.extents:
                seeds.append(header.pack(SECRET))
    return seeds


TARGETS: Final[dict[str, FuzzTarget]] = {
    "superblock": FuzzTarget(feed_superblock, superblock_seeds),
    "header": FuzzTarget(feed_header, header_seeds),
    "record": FuzzTarget(feed_record, record_seeds),
    "session": FuzzTarget(feed_session, session_seeds),
    "roster": FuzzTarget(feed_roster, roster_seeds, mutating.mutated_json),
    "config": FuzzTarget(feed_config, config_seeds, mutating.mutated_text),
    "tables": FuzzTarget(feed_tables, table_seeds, mutated_rows),
    "warehouse": FuzzTarget(feed_warehouse, table_seeds, mutated_rows),
    "request": FuzzTarget(feed_request, request_seeds, mutating.mutated_packed),
    "reply": FuzzTarget(feed_reply, reply_seeds, mutating.mutated_packed),
    "frames": FuzzTarget(feed_frames, request_seeds),
    "chain": FuzzTarget(feed_chain, chain_seeds, mutating.mutated_json),
    "layout": FuzzTarget(
        feed_layout, lambda: [layout_to_json(layout) for layout in LAYOUTS.values()],
        mutating.mutated_json,
    ),
    "name": FuzzTarget(feed_name, name_seeds, mutating.mutated_text),
}  # fmt: skip
