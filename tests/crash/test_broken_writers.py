"""Writers that are broken on purpose are caught: by the checker, by the read, or by both.

A crash test counts only because the first test here shows it failing. A power cut takes back, on
the open device, every write that no flush has followed; test_powercuts.py has all other cuts, and
the writers that only those show.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support.powercut import Recorder
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    chain_of,
    make_warehouse,
    open_warehouse,
    put,
    read_all,
    upload_all,
)
from twfs.core.state import Core
from twfs.datapath import putting
from twfs.devices.device import Device
from twfs.devices.standing import Standings
from twfs.errors import BadPayload, BlockGone
from twfs.metadata import ledger
from twfs.metadata.tables import WriteView
from twfs.records import Block, BlockKey, Checksums
from twfs.store import ReadOutcome
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse


def invariants(warehouse: Warehouse) -> set[int]:
    """What the checker finds broken."""
    return {finding.invariant for finding in warehouse.check(data=True).findings}


def outcomes(warehouse: Warehouse, blocks: int) -> list[ReadOutcome]:
    """Read seed 0's chain as an engine does."""
    model = warehouse.open_model("m")
    with warehouse.match(model, chain_of(model, blocks)) as match:
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(match.blocks)]
        return list(match.read_into(into).outcomes)


def test_a_power_cut_takes_nothing_that_a_sound_writer_published(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Recorder(monkeypatch)
    for turn in range(1, 6):
        with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
            model = warehouse.open_model("m", MHA)
            put(warehouse, model, chain_of(model, 6 * turn))
            pending = upload_all(warehouse, model, chain_of(model, 8, turn))
            assert cut.unflushed_bytes()  # there is something to lose
            cut.cut()
            assert read_all(warehouse, model, chain_of(model, 6 * turn)) == 6 * turn
            pending.abandon()


def test_a_writer_that_publishes_before_it_flushes_is_caught(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Recorder(monkeypatch)
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
        monkeypatch.setattr(Standings, "flush", lambda *_: set())
        assert put(warehouse, model, chain_of(model, 5)).held == 5
        assert invariants(warehouse) == set()  # until the power goes
        cut.cut()
        assert invariants(warehouse) == {5, 12}
        good, bad = ReadOutcome.HIT, ReadOutcome.BAD_CHECKSUM
        assert outcomes(warehouse, 5)[:3] == [good, good, bad]


def no_header(*_: object) -> bytes:
    return bytes(ALIGN)


def other_sums(block: Any, sums: Checksums) -> Any:
    return right_with_sums(block, Checksums(bytes(16), sums.lane_plain, sums.lane_weighted))


def other_lanes(block: Any, sums: Checksums) -> Any:
    return right_with_sums(block, Checksums(sums.xxh3, sums.lane_plain ^ 1, sums.lane_weighted))


def lost_write(_: Device, buffers: Any, offset: Any) -> None:
    """A device that says yes and does nothing."""


def misdirected_write(device: Device, buffers: Any, offset: Any) -> None:
    right_write(device, buffers, offset + (1 << 20))


def first_half_only(device: Device, buffers: Any, offset: Any) -> None:
    """A torn write: the header came through, the payload did not."""
    right_write(device, [buffers[0]], offset)


right_with_sums, right_write = Block.with_sums, Device.write_from


class Fault(NamedTuple):
    """What is replaced by what, what the checker finds of it, and what a reader gets."""

    owner: Any
    name: str
    by: Callable[..., Any]
    found: set[int]
    read: ReadOutcome


FAULTS = [
    Fault(putting.Put, "_header", no_header, {5, 12}, ReadOutcome.HIT),  # the payload is right
    Fault(Block, "with_sums", other_sums, {12}, ReadOutcome.BAD_CHECKSUM),
    Fault(Device, "write_from", lost_write, {5, 12}, ReadOutcome.BAD_CHECKSUM),
    Fault(Device, "write_from", misdirected_write, {5, 12}, ReadOutcome.BAD_CHECKSUM),
    Fault(Device, "write_from", first_half_only, {12}, ReadOutcome.BAD_CHECKSUM),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.by.__name__)
def test_a_writer_whose_bytes_are_not_what_it_says_is_caught(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        with monkeypatch.context() as patch:
            patch.setattr(fault.owner, fault.name, fault.by)
            put(warehouse, model, chain_of(model, 1))
        assert invariants(warehouse) == fault.found
        key = BlockKey(model.id, chain_of(model, 1).hash_at(0))
        info = warehouse.block_info(key)
        assert outcomes(warehouse, 1) == [fault.read]
        warehouse._puts.shutdown()  # a reader's report has been judged by then
        with pytest.raises((BadPayload, BlockGone)):
            warehouse.read_block(info)
        assert warehouse.lookup(model, chain_of(model, 1)) == 0  # a hole, by whoever found it


def test_wrong_lane_sums_are_caught(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU: the host reader goes by the other sum, and does not look."""
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        monkeypatch.setattr(Block, "with_sums", other_lanes)
        put(warehouse, model, chain_of(model, 1))
        assert invariants(warehouse) == {12}


@contextmanager
def broken_tables(name: str) -> Iterator[None]:
    """Let one method of the tables do nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriteView, name, lambda *_, **__: None)
        yield


@pytest.mark.parametrize(
    ("breaking", "found"),
    [
        (broken_tables("take_free"), {3}),  # the same space could be given away again
        (broken_tables("add_child"), {8}),
    ],
)
def test_a_publish_that_forgets_a_table_is_caught(
    scratch: Path, breaking: AbstractContextManager[None], found: set[int]
) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
        with breaking:
            put(warehouse, model, chain_of(model, 3))
        assert invariants(warehouse) == found


def test_an_eviction_from_the_middle_is_caught(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 3)
        put(warehouse, model, names)
        monkeypatch.setattr(WriteView, "children", lambda *_: [])
        key = BlockKey(model.id, names.hash_at(1))

        def job(view: WriteView) -> ledger.Removed:
            return ledger.remove(view, core.models[model.id], [key], to_limbo=frozenset())

        core.metadata.submit(job).result()
        monkeypatch.undo()
        assert 16 in invariants(warehouse)
        assert warehouse.lookup(model, names) == 1


def test_numbers_that_were_not_made_durable_are_caught_when_given_again(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)

    def forgetful(core: Core, count: int) -> None:
        core._next_generation, core._next_ino = 1, 1 << 20
        core._numbers_end = 1 + count

    monkeypatch.setattr(Core, "_extend_numbers", forgetful)
    for seed in range(2):
        with Warehouse.open(scratch) as warehouse:
            model = warehouse.open_model("m", MHA)
            put(warehouse, model, chain_of(model, 1, seed))
            assert 6 in invariants(warehouse)


def test_space_freed_too_early_is_caught_when_it_is_written_again(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limbo skipped: a lease is still reading what another put overwrites."""
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        match = warehouse.match(model, names)
        right = ledger.remove

        def hasty(*args: Any, to_limbo: frozenset[int], over: bool) -> ledger.Removed:
            with warehouse._core.lock:
                warehouse._core.slots.leases[:] = 0
            return right(*args, to_limbo=frozenset(), over=over)

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "remove", hasty)
            warehouse.remove(model.id, names.hash_at(2))
        for seed in range(1, 40):
            put(warehouse, model, chain_of(model, 48, seed))
        warehouse.evict(ByteCount(1))
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(3)]
        assert ReadOutcome.BAD_CHECKSUM in match.read_into(into).outcomes
