"""A rank of vLLM's connector and its memory: what is a block of it, and when it is not touched.

See support.vllmworker: vLLM's own code around the adapter, a real daemon, no engine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.asking import Asked
from support.daemon import Daemon, running_daemon
from support.engines import blocks_in, engine_python, until, until_stored
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.vllms import DEVICE_BYTES, ENVIRONMENT
from twfs.devices.formatting import DeviceSpec
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

LAYERS: Final = 4
LAYER_BYTES: Final = 4096  # of one of the engine's blocks
PER_CHUNK: Final = 4  # of these in a stored block
BLOCK_BYTES: Final = LAYERS * LAYER_BYTES
STORED: Final = [9, 3, 4, 5, 30, 1, 2, 8]  # the engine's blocks of two stored ones
OTHERS: Final = [40, 41, 42, 43, 20, 22, 21, 7]
MANY: Final = [*STORED, *range(44, 60)]  # four more, of which the arena takes two
READS: Final = Rule(disk="a", op=Op.READ, act=Act.HANG)
WRITES: Final = Rule(disk="a", op=Op.WRITE, act=Act.HANG)
both = pytest.mark.parametrize("name", ["vllm", "vllm33"])


class Rank(Asked):
    """The process."""

    def __init__(
        self, name: str, daemon: Daemon, *, packed: bool = True, block_bytes: int = BLOCK_BYTES,
        revision: str = "none",
    ) -> None:  # fmt: skip
        super().__init__(
            [engine_python(name), "-m", "support.vllmworker", daemon.socket,
             str(int(packed)), str(block_bytes), revision],
            **ENVIRONMENT,
        )  # fmt: skip

    def content(self, blocks: list[int]) -> str:
        """What is in these blocks of the engine."""
        found: str = self.ask(do="content", blocks=blocks)
        return found

    def until_finished(self, count: int) -> dict[str, Any]:
        """Wait until so many jobs have; all that was told since the last time."""
        seen: dict[str, Any] = {"jobs": [], "failed": [], "held": []}

        def enough() -> bool:
            new = self.ask(do="finished")
            seen["jobs"] += new["jobs"]
            seen["failed"] += new["failed"]
            seen["held"] = new["held"]
            return len(seen["jobs"]) >= count

        until(enough, f"{count} jobs finish")
        return seen

    def store_two(self, daemon: Daemon) -> str:
        """Fill the memory and store two blocks of it; what is in them."""
        self.ask(do="fill", seed=1)
        assert self.ask(do="store", blocks=STORED) == 2
        until_stored(daemon, 2)
        self.until_finished(1)
        return self.content(STORED)


@both
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "by layer"])
def test_a_block_of_all_layers_is_one_piece_where_it_is_one_in_memory(
    name: str, packed: bool, daemon: Daemon
) -> None:
    with Rank(name, daemon, packed=packed) as rank:
        assert rank.ask(do="layout") == "BLHNC"  # which is the packed one
        size, pieces = (BLOCK_BYTES, PER_CHUNK) if packed else (LAYER_BYTES, PER_CHUNK * LAYERS)
        assert rank.ask(do="pieces", blocks=STORED[:PER_CHUNK]) == [size] * pieces
        stored = rank.store_two(daemon)
        rank.ask(do="fill", seed=2)
        beside = [block for block in range(64) if block not in OTHERS]
        before = rank.content(beside)
        assert rank.ask(do="load", blocks=OTHERS, seconds=60) == 2
        assert rank.until_finished(1)["failed"] == []
        assert rank.content(OTHERS) == stored
        assert rank.content(beside) == before


@both
@pytest.mark.parametrize(
    ("believed", "said"),
    [({"block_bytes": BLOCK_BYTES // 2}, "this rank's KV is not as the scheduler's"),
     ({"revision": "other"}, "this rank's layout is not the scheduler's")],
    ids=["memory", "layout"],
)  # fmt: skip
def test_what_is_not_as_the_scheduler_believes_is_never_stored(
    name: str, daemon: Daemon, believed: dict[str, Any], said: str
) -> None:
    with Rank(name, daemon, **believed) as rank:
        assert rank.ask(do="store", blocks=STORED) == 2
        rank.until_finished(1)
        until(lambda: rank.ask(do="finished")["held"] == [0], "the store has ended")
        assert f"{said}: str" in rank.ask(do="counts")
        assert blocks_in(daemon) == 0


@pytest.fixture
def disks(scratch: Path) -> Iterator[FaultyDisks]:
    with faulty_disks(scratch / "disks", {"a": DEVICE_BYTES}) as made:
        Warehouse.create(scratch / "w", [DeviceSpec(made.loops["a"])])
        yield made


@needs_faults
@both
def test_memory_is_given_back_when_nothing_reads_or_writes_it_any_more(
    name: str, scratch: Path, disks: FaultyDisks
) -> None:
    with running_daemon(scratch / "w") as daemon, Rank(name, daemon) as rank:
        stored = rank.store_two(daemon)
        disks.set_rules(READS, WRITES)
        assert rank.ask(do="load", blocks=OTHERS, seconds=60) == 2
        assert rank.ask(do="store", blocks=MANY) == 4
        until(lambda: min(disks.acted()) > 0, "both hang")
        before = [rank.content(MANY[: PER_CHUNK * count]) for count in range(7)]
        rank.ask(do="unregister")
        for _ in range(10):
            assert not rank.ask(do="returned")
        disks.lift()
        until(lambda: rank.ask(do="returned"), "it is given back")
        assert rank.content(OTHERS) == stored  # all of it, and no later
        rank.ask(do="fill", seed=3)  # whose bytes nobody must store
        done = rank.ask(do="finished")
        assert (len(done["jobs"]), done["failed"]) == (2, [])
        until(lambda: len(rank.ask(do="finished")["held"]) == 2, "the store has ended")
        held = rank.ask(do="load", blocks=MANY, seconds=60)
        assert held >= 2
        assert rank.until_finished(1)["failed"] == []
        assert rank.content(MANY[: PER_CHUNK * held]) == before[held]


@needs_faults
@both
def test_memory_is_given_back_while_a_disk_hangs_and_late_bytes_go_nowhere(
    name: str, scratch: Path, disks: FaultyDisks
) -> None:
    with running_daemon(scratch / "w") as daemon, Rank(name, daemon) as rank:
        rank.store_two(daemon)
        disks.set_rules(READS)
        assert rank.ask(do="load", blocks=OTHERS, seconds=1.0) == 2
        until(lambda: disks.hanging() > 0, "the load hangs")
        rank.ask(do="unregister")
        until(lambda: rank.ask(do="returned"), "it is given back")
        assert disks.hanging() > 0
        done = rank.ask(do="finished")
        assert (len(done["jobs"]), done["failed"]) == (1, sorted(OTHERS))
        rank.ask(do="fill", seed=3)
        others = rank.content(OTHERS)
        disks.lift()
        until(lambda: disks.hanging() == 0, "what hung goes on")
        if rank.ask(do="load", blocks=STORED, seconds=60):  # behind what was late
            rank.until_finished(1)
        assert rank.content(OTHERS) == others
