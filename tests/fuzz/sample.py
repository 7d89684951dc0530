"""A small real warehouse with one of everything, for fuzz targets to be hostile to.

Chains, a fork, shards, window and state groups, own keys, a detached block, a hole, an older epoch
and retired limbo. Names, slots, generations and inodes are the same each time, so that stored
inputs that name them stay good.
"""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from fuzz.run import parent_directory
from support.warehouses import (
    HYBRID,
    MHA,
    SHARDED,
    block_at,
    chain_of,
    make_warehouse,
    own_names,
    payload_of,
    put,
    put_whole,
    settle,
    stop_tending,
)
from twfs.errors import TwfsError
from twfs.eviction import evicting
from twfs.metadata.environment import Metadata
from twfs.metadata.tables import TABLES, ReadView, WriteView
from twfs.prefix import Names
from twfs.store import Model, ReadOutcome
from twfs.warehouse import Warehouse

EVERY_TABLE: Final = (*TABLES, "children")


class _Undo(Exception):
    """Raised to end a transaction without a trace."""


def fill(warehouse: Warehouse) -> None:
    """Store one of everything."""
    mha = warehouse.open_model("mha", MHA)
    put(warehouse, mha, chain_of(mha, 6))
    put(warehouse, mha, chain_of(mha, 5, 1, fork=3))
    detached = chain_of(mha, 4, 7)
    put(warehouse, mha, detached.slice(2, 4))
    sharded = warehouse.open_model("sharded", SHARDED)
    put_whole(warehouse, sharded, chain_of(sharded, 3))
    hybrid = warehouse.open_model("hybrid", HYBRID)
    put_whole(warehouse, hybrid, chain_of(hybrid, 2))
    own = warehouse.open_model("own", MHA)
    put(warehouse, own, own_names(own, ("a", None, 0), ("b", "a", 9), ("c", "b", 0)))
    lost = chain_of(mha, 6)
    key, block = block_at(warehouse, mha, lost, 4)
    assert evicting.spoil(warehouse._core, key, block.generation)
    old = warehouse.open_model("old", MHA)
    put(warehouse, old, chain_of(old, 2))
    held = warehouse.match(old, chain_of(old, 2))
    warehouse.new_epoch(old)
    held.release()


@functools.cache
def sample_directory() -> Path:
    """The warehouse's directory, closed; removed when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="twfs-fuzz-", dir=parent_directory()))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    make_warehouse(directory)
    warehouse = Warehouse.open(directory)
    stop_tending(warehouse)
    fill(warehouse)
    settle(warehouse)
    assert warehouse.check(data=True).findings == ()
    warehouse.close()
    return directory


class Copy:
    """A copy of the sample that may be spoilt, and is as new after `renew`."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(dir=sample_directory().parent)) / "w"
        shutil.copytree(sample_directory(), self.directory)
        if directory is None:
            atexit.register(shutil.rmtree, self.directory.parent, ignore_errors=True)
        self.database = self.directory / "meta" / "data.mdb"
        self._content = self.database.read_bytes()
        self._heat = (self.directory / "heat").read_bytes()

    def renew(self) -> None:
        """Undo what was done to the metadata. Who only looks does not write the device."""
        self.database.write_bytes(self._content)
        (self.directory / "heat").write_bytes(self._heat)


def look_at_everything(warehouse: Warehouse) -> None:
    """Ask all that an operator or an engine may ask of a warehouse; TwfsError only."""
    asks: list[Callable[[], object]] = [
        lambda: warehouse.check(data=True), warehouse.space, warehouse.statistics, warehouse.models
    ]  # fmt: skip
    for name in ("mha", "sharded", "hybrid", "own", "old"):
        with suppress(TwfsError):
            model = warehouse.open_model(name)
            names = chain_of(model, 6)
            asks += [
                partial(warehouse.lookup, model, names),
                partial(warehouse.explain, model.id, names),
                partial(read_matched, warehouse, model, names), partial(list_all, warehouse, model),
            ]  # fmt: skip
    for ask in asks:
        with suppress(TwfsError):
            ask()


def read_matched(warehouse: Warehouse, model: Model, names: Names) -> None:
    """Read what matches: whatever the records say, a hit has the bytes that were put."""
    with warehouse.match(model, names) as match:
        for row in match._located:
            group, shard, index = (int(row[name]) for name in ("group", "shard", "index"))
            if group >= len(model.layout.groups):
                continue
            into = bytearray(model.layout.block_bytes(group))
            with suppress(TwfsError):
                report = match.read_into([into], group=group, shard=shard, first=index)
                if report.outcomes == (ReadOutcome.HIT,):
                    wanted = payload_of(model.layout, names.hash_at(index), group, shard)
                    assert bytes(into) == wanted.tobytes(), "wrong bytes were delivered"


def list_all(warehouse: Warehouse, model: Model) -> None:
    """Everything that the mount would list of *model*, payloads included."""
    for key in warehouse.detached(model.id):
        with suppress(TwfsError):
            warehouse.block_info(key)
    for session in warehouse.sessions(model.id):
        with suppress(TwfsError):
            for info in warehouse.chain_of(model.id, session.head):
                with suppress(TwfsError):
                    warehouse.read_block(info)


@functools.cache
def sample_warehouse() -> Warehouse:
    """The warehouse, open in this process until it ends. Nothing may change it."""
    warehouse = Warehouse.open(sample_directory())
    stop_tending(warehouse)
    atexit.register(warehouse.close)
    return warehouse


def rows_of_tables(view: ReadView) -> list[tuple[str, bytes, bytes]]:
    """Every (table, key, value), by table."""
    return [
        (table, bytes(key), bytes(value))
        for table in EVERY_TABLE
        for key, value in view._txn.cursor(db=view._tables[table])
    ]


@contextmanager
def changed_tables(
    metadata: Metadata, changes: list[tuple[str, bytes, bytes | None]]
) -> Iterator[WriteView]:
    """The tables with *changes* in them (None takes a key out), in a transaction that is undone.

    ValueError if LMDB takes such keys or values from nobody.
    """
    try:
        with metadata._environment.begin(write=True) as txn:
            view = WriteView(txn, metadata._tables)
            change_tables(view, changes)
            yield view
            raise _Undo
    except _Undo:
        return


def change_tables(view: WriteView, changes: list[tuple[str, bytes, bytes | None]]) -> None:
    """Make *changes*; what LMDB takes from nobody is left out."""
    for table, key, value in changes:
        sorted_value = table == "children" and value is not None
        if not 0 < len(key) <= 511 or (sorted_value and not 0 < len(value or b"") <= 511):
            continue
        if value is None:
            view._txn.delete(key, db=view._tables[table])
        else:
            view._txn.put(key, value, db=view._tables[table])
