"""A device that hangs holds up who waits for it, and nobody else; when it goes on, all goes on.

Two real block devices, each over a faulty disk of its own, in this process and behind a real
daemon. While one hangs: match, lookup and touch answer, blocks of the other device are read, and
the daemon answers everybody. What hung ends with the device's answer: right bytes, or a miss; the
lease decides, however long it took. A read with a deadline ends at it: what is missing is a miss,
and the engine's memory is never written afterwards.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support.daemon import running_daemon
from support.faultrules import Act, Op
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.mediafaults import DISKS, HIT, devices_of, everywhere, judged, outcomes
from support.mounting import until
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    chain_of,
    open_warehouse,
    payload_of,
    payloads_of,
    put,
    read_all,
)
from twfs.devices.formatting import DeviceSpec
from twfs.prefix import Names
from twfs.store import Model, PutOutcome, ReadOutcome, Store
from twfs.units import DeviceIndex
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.root, pytest.mark.fuse, needs_faults]

BLOCKS = 6
SEEDS = 8
LEASE_MS = 400
TIMEOUT_S = 0.5
TIMED_OUT = ReadOutcome.TIMED_OUT
PUBLISHED, FAILED = PutOutcome.PUBLISHED, PutOutcome.FAILED


@dataclass(frozen=True, slots=True)
class Pair:
    """A warehouse on two devices, of which the first can hang."""

    hanging: FaultyDisks
    directory: Path

    @contextmanager
    def hang(self, op: Op) -> Iterator[None]:
        """Let the first device hang in this context, which a failing test leaves too."""
        self.hanging.set_rules(everywhere(op, Act.HANG))
        try:
            yield
        finally:
            self.hanging.set_rules()

    def until_hung(self) -> None:
        """Wait until somebody waits for the device."""
        until(lambda: self.hanging.hanging() > 0, "the device is asked")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyDisks, FaultyDisks]]:
    # The kernel lets few requests wait in one mount: so each disk has one of its own.
    base = tmp_path_factory.mktemp("hanging")
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(faulty_disks(base / name, {name: DEVICE_BYTES})) for name in DISKS
        )
        yield first, second


@pytest.fixture
def pair(disks: tuple[FaultyDisks, FaultyDisks], scratch: Path) -> Iterator[Pair]:
    directory = scratch / "warehouse"
    specs = [DeviceSpec(loop) for each in disks for loop in each.loops.values()]
    Warehouse.create(directory, specs, force=True)
    yield Pair(disks[0], directory)
    disks[0].set_rules()


@pytest.fixture
def threads(pair: Pair) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool
        pair.hanging.lift()  # a test that fails must not wait for ever


def single_blocks(warehouse: Warehouse, model: Model) -> list[list[Names]]:
    """Put chains of one block each; those on the first, and those on the second device."""
    found: list[list[Names]] = [[], []]
    for seed in range(100, 100 + SEEDS):
        names = chain_of(model, 1, seed)
        put(warehouse, model, names)
        found[devices_of(warehouse, model, names)[0]].append(names)
    assert all(found)
    return found


def ended(future: "Future[list[ReadOutcome]]") -> list[ReadOutcome]:
    """What a call that hung came to, once the device goes on."""
    return future.result(timeout=60)


def test_a_read_that_hangs_holds_up_nobody_else_and_ends_with_the_device(
    pair: Pair, threads: ThreadPoolExecutor
) -> None:
    with open_warehouse(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        first, second = single_blocks(warehouse, model)
        with pair.hang(Op.READ):
            stuck = [threads.submit(outcomes, warehouse, model, each) for each in (names, first[0])]
            pair.until_hung()
            with warehouse.match(model, names) as match:
                assert match.blocks == BLOCKS
            assert warehouse.lookup(model, names) == BLOCKS
            warehouse.touch(model, names)
            assert warehouse.explain(model.id, names).hit_blocks == BLOCKS
            assert [outcomes(warehouse, model, each) for each in second] == [[HIT]] * len(second)
            assert not any(future.done() for future in stuck)
        assert ended(stuck[0]) == [HIT] * BLOCKS
        assert ended(stuck[1]) == [HIT]
        assert pair.hanging.hanging() == 0


def test_a_read_that_ends_in_an_error_after_all_is_a_miss(
    pair: Pair, threads: ThreadPoolExecutor
) -> None:
    with open_warehouse(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
        with pair.hang(Op.READ):
            stuck = threads.submit(outcomes, warehouse, model, names)
            pair.until_hung()
            pair.hanging.set_rules(everywhere(Op.READ, Act.EIO))  # as a driver that gives up
            wanted = [ReadOutcome.DEVICE_ERROR if first else HIT for first in on_first]
            assert ended(stuck) == wanted
            judged(warehouse)


def test_a_read_that_hung_for_longer_than_its_lease_is_a_miss(
    pair: Pair, threads: ThreadPoolExecutor
) -> None:
    with open_warehouse(pair.directory, lease_ms=LEASE_MS) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        with pair.hang(Op.READ):
            stuck = threads.submit(outcomes, warehouse, model, names)
            pair.until_hung()
            until(lambda: not warehouse._core.leases.statistics()["leases"], "the lease ends")
        assert ended(stuck) == [ReadOutcome.LEASE_ENDED] * BLOCKS
    with open_warehouse(pair.directory) as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), names) == BLOCKS


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH], ids=["write", "flush"])
@pytest.mark.parametrize("gives_up", [False, True], ids=["goes on", "gives up"])
def test_a_put_that_hangs_is_published_when_the_device_goes_on_or_fails_when_it_gives_up(
    pair: Pair, threads: ThreadPoolExecutor, op: Op, gives_up: bool
) -> None:
    with open_warehouse(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        second = single_blocks(warehouse, model)[1]
        with pair.hang(op):
            stuck = threads.submit(put, warehouse, model, names)
            pair.until_hung()
            assert warehouse.lookup(model, names) == 0  # not before it is durable
            assert [outcomes(warehouse, model, each) for each in second] == [[HIT]] * len(second)
            if gives_up:
                pair.hanging.set_rules(everywhere(op, Act.EIO))
                stuck.exception(timeout=60)
        result = stuck.result(timeout=60)
        assert FAILED in result.outcomes if gives_up else result.held == BLOCKS
        assert warehouse.lookup(model, names) == result.held
        assert outcomes(warehouse, model, names) == [HIT] * result.held


def test_a_daemon_whose_device_hangs_answers_all_its_clients(
    pair: Pair, threads: ThreadPoolExecutor
) -> None:
    with Warehouse.open(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        second = single_blocks(warehouse, model)[1]
    with (
        running_daemon(pair.directory) as daemon,
        daemon.client() as engine,
        daemon.client() as other,
    ):
        model = engine.open_model("m", MHA)
        with pair.hang(Op.READ):
            stuck = threads.submit(outcomes, engine, model, names)
            pair.until_hung()
            for client in (engine, other):  # the one that waits answers on its other threads too
                with client.match(model, names) as match:
                    assert match.blocks == BLOCKS
                assert client.lookup(model, names) == BLOCKS
                client.touch(model, names)
                assert [outcomes(client, model, each) for each in second] == [[HIT]] * len(second)
                assert client.statistics()["counters"]["matches"] > 0  # the daemon's own
        assert ended(stuck) == [HIT] * BLOCKS
        new = chain_of(model, BLOCKS, 3)
        with pair.hang(Op.WRITE):
            putting = threads.submit(other.put, model, new, payloads_of(MHA, new))
            pair.until_hung()
            with daemon.client() as late:
                assert late.lookup(model, names) == BLOCKS
                assert late.lookup(model, new) == 0
                assert [outcomes(late, model, each) for each in second] == [[HIT]] * len(second)
        assert putting.result(timeout=60).held == BLOCKS
        assert outcomes(engine, model, new) == [HIT] * BLOCKS


def timely(found: Iterable[ReadOutcome], missing: list[bool]) -> bool:
    """Whether all is there but what was *missing*, and what a busy machine was too slow for."""
    return all(
        outcome is TIMED_OUT or (outcome is HIT and not missed)
        for outcome, missed in zip(found, missing, strict=True)
    )


def left_behind(
    pair: Pair, store: Store, model: Model, names: Names, missing: list[bool], *, as_future: bool,
    ahead: bool = False,
) -> None:  # fmt: skip
    """Read while the first device hangs; no byte of what was *missing* comes when it goes on."""
    mark = 0xA5
    match = store.match(model, names)
    into = [np.full(MHA.block_bytes(), mark, np.uint8) for _ in range(match.blocks)]
    with pair.hang(Op.READ):
        if ahead:
            match.read_ahead()
        if as_future:
            report = match.read_async(into, timeout_s=TIMEOUT_S).result(timeout=60)
        else:
            report = match.read_into(into, timeout_s=TIMEOUT_S)
        assert timely(report.outcomes, missing)
        assert pair.hanging.hanging() > 0  # it was left behind, and neither waited for nor ended
        match.release()
    until(lambda: pair.hanging.hanging() == 0, "the device goes on")
    until(lambda: outcomes(store, model, names) == [HIT] * BLOCKS, "it is not hung any more")
    assert outcomes(store, model, names, timeout_s=60.0) == [HIT] * BLOCKS
    for at, outcome in enumerate(report.outcomes):
        hit = outcome is HIT
        wanted = payload_of(MHA, names.hash_at(at)) if hit else np.full_like(into[at], mark)
        assert np.array_equal(into[at], wanted)


@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "ahead"])
@pytest.mark.parametrize("as_future", [False, True], ids=["call", "future"])
def test_a_read_with_a_deadline_ends_at_it_and_its_memory_is_not_written_afterwards(
    pair: Pair, as_future: bool, *, ahead: bool
) -> None:
    with open_warehouse(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
        assert any(on_first)
        left_behind(pair, warehouse, model, names, on_first, as_future=as_future, ahead=ahead)


def test_a_client_ends_at_its_deadline_and_closes_while_the_device_hangs(pair: Pair) -> None:
    with Warehouse.open(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        on_first = [device == 0 for device in devices_of(warehouse, model, names)]
    with running_daemon(pair.directory) as daemon, daemon.client() as engine:
        model = engine.open_model("m", MHA)
        left_behind(pair, engine, model, names, on_first, as_future=False)
        with pair.hang(Op.READ):
            with daemon.client() as leaving:
                assert timely(outcomes(leaving, model, names, timeout_s=TIMEOUT_S), on_first)
            assert pair.hanging.hanging() > 0
        assert outcomes(engine, model, names) == [HIT] * BLOCKS


def test_blocks_of_a_device_that_is_known_to_hang_are_misses_at_once(pair: Pair) -> None:
    with open_warehouse(pair.directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, BLOCKS)
        put(warehouse, model, names)
        first, second = single_blocks(warehouse, model)
        with pair.hang(Op.READ):
            assert outcomes(warehouse, model, first[0], timeout_s=TIMEOUT_S) == [TIMED_OUT]
            readers = warehouse._sources.now()
            source = readers.sources[DeviceIndex(0)]
            until(lambda: readers._watch.hung(source), "it is known")
            asked = pair.hanging.hanging()
            for each in first:
                assert outcomes(warehouse, model, each) == [TIMED_OUT]
            assert [outcomes(warehouse, model, each) for each in second] == [[HIT]] * len(second)
            assert pair.hanging.hanging() == asked  # nothing was asked of it any more
        until(lambda: not readers._watch.hung(source), "it goes on")
        assert outcomes(warehouse, model, names) == [HIT] * BLOCKS
