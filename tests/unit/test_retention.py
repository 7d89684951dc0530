"""Classes: what goes first, what goes after its time, what never goes, and what is refused."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.warehouses import (
    BIG,
    DEVICE_BYTES,
    MHA,
    SHARDED,
    assert_sound,
    block_at,
    chain_of,
    open_warehouse,
    put,
    read_all,
    settle,
    stop_tending,
)
from twfs import Hint, Retention
from twfs.config import Config, parse
from twfs.errors import DeviceError, PromiseRefused, WarehouseFull
from twfs.eviction.evicting import freed_bytes, sweep_expired
from twfs.eviction.retaining import flush, keep_classes
from twfs.index.clocks import STAMP_MS_MAX, Steady
from twfs.prefix import Names
from twfs.recovery.rebuild import rebuild
from twfs.store import Model, PutOutcome
from twfs.units import ALIGN, ByteCount, Millis
from twfs.warehouse import Warehouse

BLOCK = 8192  # bytes on the device of one block of the small layouts
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Time:
    """A clock that stands until it is set."""

    def __init__(self, now_ms: int = 1000 * DAY_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> Millis:
        return Millis(self.now_ms)


@contextmanager
def at(
    time: Time, directory: Path, text: str = "", devices: Sequence[int] = (DEVICE_BYTES,)
) -> Iterator[Warehouse]:
    """A warehouse on that time; nothing happens in it by itself."""
    with open_warehouse(
        directory, devices, clock=time, config=parse(text.encode())
    ) as warehouse:  # fmt: skip
        stop_tending(warehouse)
        yield warehouse


def sweep(warehouse: Warehouse) -> int:
    """Blocks that the background takes because their time is over."""
    blocks = 0
    while futures := sweep_expired(warehouse._core):
        blocks += int(freed_bytes(futures)) // BLOCK
        settle(warehouse)
    return blocks


def status(warehouse: Warehouse, retention: Retention) -> dict[str, Any]:
    found: dict[str, Any] = warehouse.statistics()["retention"][retention.value]
    return found


def session(warehouse: Warehouse, model: Model, seed: int, retention: Retention) -> Names:
    """A chain of 4 blocks of its own, with that class."""
    names = chain_of(model, 4, seed)
    put(warehouse, model, names, retention=retention)
    return names


def test_classes_go_in_their_order_and_pinned_ones_never(scratch: Path) -> None:
    with at(Time(), scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        held = {
            retention: session(warehouse, model, seed, retention)
            for seed, retention in enumerate(reversed(Retention), 1)
        }  # the ephemeral one is the youngest
        for gone in range(3):
            warehouse.evict(ByteCount(4 * BLOCK))
            left = [read_all(warehouse, model, held[each]) for each in Retention]
            assert left == [0] * (gone + 1) + [4] * (3 - gone)
        assert warehouse.evict(ByteCount(1 << 30)) == 0
        assert read_all(warehouse, model, held[Retention.PINNED]) == 4
        assert status(warehouse, Retention.PINNED)["promises_broken"] == 0


def test_a_put_that_would_need_a_pinned_block_is_refused_and_loses_none(scratch: Path) -> None:
    with at(Time(), scratch, "[retention.pinned]\nshare = 1.0", (16 << 20,)) as warehouse:
        model, core = warehouse.open_model("m", BIG), warehouse._core
        left = core.allocator.free_bytes // (BIG.block_bytes(0) + ALIGN)
        names = chain_of(model, left)
        assert put(warehouse, model, names, retention=Retention.PINNED).held == left
        with pytest.raises(WarehouseFull):
            put(warehouse, model, chain_of(model, 1, 77))
        assert read_all(warehouse, model, names) == left


def test_what_is_over_goes_in_the_background_and_what_is_not_stays(scratch: Path) -> None:
    time = Time()
    text = "[retention.ephemeral]\nttl = '1h'\n[retention.durable]\nttl = '2d'"
    with at(time, scratch, text) as warehouse:
        model = warehouse.open_model("m", MHA)
        short, plain, long = (
            session(warehouse, model, seed, retention)
            for seed, retention in enumerate(
                (Retention.EPHEMERAL, Retention.STANDARD, Retention.DURABLE)
            )
        )
        assert sweep(warehouse) == 0
        time.now_ms += HOUR_MS - 1
        assert sweep(warehouse) == 0
        warehouse.touch(model, short.head(2))  # a use counts for what it used
        time.now_ms += 1
        assert sweep(warehouse) == 2
        time.now_ms += HOUR_MS
        assert sweep(warehouse) == 2
        time.now_ms += 2 * DAY_MS
        assert sweep(warehouse) == 4
        assert [read_all(warehouse, model, each) for each in (short, plain, long)] == [0, 4, 0]
        for retention in (Retention.EPHEMERAL, Retention.DURABLE):
            said = status(warehouse, retention)
            assert (said["promises_kept"], said["promises_broken"]) == (4, 0)
            assert said["promises_kept_ratio"] == 1.0
        assert warehouse._core.counters.expired_blocks == 8


def test_what_is_over_goes_first_when_room_is_needed(scratch: Path) -> None:
    time = Time()
    with at(time, scratch, "[retention.durable]\nttl = '1d'") as warehouse:
        model = warehouse.open_model("m", MHA)
        old = session(warehouse, model, 1, Retention.DURABLE)
        time.now_ms += 2 * DAY_MS
        fresh = session(warehouse, model, 2, Retention.EPHEMERAL)
        warehouse.evict(ByteCount(4 * BLOCK))
        assert [read_all(warehouse, model, each) for each in (old, fresh)] == [0, 4]


def test_a_promise_that_eviction_breaks_is_counted(scratch: Path) -> None:
    time = Time()
    with at(time, scratch, "[retention.ephemeral]\nttl = '1h'") as warehouse:
        model = warehouse.open_model("m", MHA)
        session(warehouse, model, 1, Retention.EPHEMERAL)
        session(warehouse, model, 2, Retention.STANDARD)
        warehouse.evict(ByteCount(3 * BLOCK))
        time.now_ms += HOUR_MS
        warehouse.evict(ByteCount(1 << 30))
        said = status(warehouse, Retention.EPHEMERAL)
        assert (said["promises_kept"], said["promises_broken"]) == (1, 3)
        assert said["promises_kept_ratio"] == 0.25
        plain = status(warehouse, Retention.STANDARD)  # is promised nothing
        assert (plain["promises_kept"], plain["promises_broken"]) == (0, 0)


def test_a_block_outlives_its_short_class_while_a_longer_one_is_over_it(scratch: Path) -> None:
    time = Time()
    with at(time, scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names, fork = chain_of(model, 4), chain_of(model, 4, 1, fork=2)
        put(warehouse, model, names, hint=Hint("short", Retention.EPHEMERAL))
        put(warehouse, model, fork, hint=Hint("long", Retention.DURABLE))
        time.now_ms += DAY_MS
        assert sweep(warehouse) == 2
        assert [read_all(warehouse, model, each) for each in (names, fork)] == [2, 4]


def test_a_class_above_its_share_gives_back_first_and_only_what_is_above(scratch: Path) -> None:
    time = Time()
    with at(time, scratch) as warehouse:
        total = warehouse._core.allocator.total_bytes
    share = 8.5 * BLOCK / total
    with at(time, scratch, f"[retention.durable]\nshare = {share:.12f}") as warehouse:
        model = warehouse.open_model("m", MHA)
        durable = []
        for seed in range(1, 5):
            time.now_ms += 1
            durable.append(session(warehouse, model, seed, Retention.DURABLE))
        plain = session(warehouse, model, 9, Retention.STANDARD)
        warehouse.evict(ByteCount(8 * BLOCK))
        left = [read_all(warehouse, model, each) for each in [*durable, plain]]
        assert left == [0, 0, 4, 4, 4]
        warehouse.evict(ByteCount(4 * BLOCK))
        left = [read_all(warehouse, model, each) for each in [*durable, plain]]
        assert left == [0, 0, 4, 4, 0]


def limited(blocks: int, total: int) -> str:
    """Settings by which so many blocks may be pinned."""
    return f"[retention.pinned]\nshare = {(blocks + 0.5) * BLOCK / total:.12f}"


@pytest.fixture
def total(scratch: Path) -> int:
    """Bytes that a warehouse of these tests has."""
    with open_warehouse(scratch) as warehouse:
        return int(warehouse._core.allocator.total_bytes)


def test_more_than_may_be_pinned_is_refused_when_it_is_asked_for(scratch: Path, total: int) -> None:
    with at(Time(), scratch, limited(10, total)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 6)
        put(warehouse, model, names)
        other = session(warehouse, model, 1, Retention.STANDARD)
        third = session(warehouse, model, 2, Retention.STANDARD)
        warehouse.set_retention(model.id, names.hash_at(5), Retention.PINNED)
        warehouse.set_retention(model.id, other.hash_at(3), Retention.PINNED)
        with pytest.raises(PromiseRefused, match="cannot be pinned"):
            warehouse.set_retention(model.id, third.hash_at(3), Retention.PINNED)
        assert core.promised_bytes == 0
        assert status(warehouse, Retention.PINNED)["bytes"] == 10 * BLOCK
        warehouse.set_retention(model.id, other.hash_at(3), Retention.STANDARD)
        warehouse.set_retention(model.id, third.hash_at(3), Retention.PINNED)
        warehouse.evict(ByteCount(1 << 30))
        assert [read_all(warehouse, model, each) for each in (names, other, third)] == [6, 0, 4]


def test_a_put_is_pinned_as_far_as_it_may_be_and_refused_where_nothing_may(
    scratch: Path, total: int
) -> None:
    with at(Time(), scratch, limited(10, total)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        trunk = chain_of(model, 3)
        put(warehouse, model, trunk)
        names = chain_of(model, 12, 1, fork=3)
        result = put(warehouse, model, names, hint=Hint("a", Retention.PINNED))
        assert (result.held, result.outcomes[10:]) == (10, (PutOutcome.NO_ROOM,) * 2)
        assert core.promised_bytes == 0
        with pytest.raises(PromiseRefused):
            put(warehouse, model, names, hint=Hint("a"))  # its session is pinned
        with pytest.raises(PromiseRefused):
            session(warehouse, model, 7, Retention.PINNED)
        put(warehouse, model, names)  # by nobody's session: what is not pinned yet
        assert read_all(warehouse, model, names) == 12
        warehouse.evict(ByteCount(1 << 30))
        assert read_all(warehouse, model, names) == 10
        assert_sound(warehouse)
        assert core.promised_bytes == 0


def test_a_touch_pins_only_what_may_be_pinned(scratch: Path, total: int) -> None:
    with at(Time(), scratch, limited(5, total)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names, other = (session(warehouse, model, seed, Retention.STANDARD) for seed in (1, 2))
        warehouse.touch(model, names, Hint("a", Retention.PINNED))
        warehouse.touch(model, other, Hint("b", Retention.PINNED))
        flush(core)
        assert status(warehouse, Retention.PINNED)["blocks"] == 4
        assert core.promises.refused == 1
        warehouse.evict(ByteCount(1 << 30))
        assert sum(read_all(warehouse, model, each) for each in (names, other)) == 4


def test_a_tail_whose_beginning_is_missing_is_not_pinned(scratch: Path, total: int) -> None:
    with at(Time(), scratch, limited(6, total)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 6)
        tail, above = names.slice(4, 6), names.slice(2, 4)
        with pytest.raises(PromiseRefused, match="beginning of its chain is missing"):
            put(warehouse, model, tail, hint=Hint("a", Retention.PINNED))
        assert put(warehouse, model, tail, hint=Hint("a")).held == 2
        with pytest.raises(PromiseRefused, match="beginning of its chain is missing"):
            warehouse.set_retention(model.id, names.hash_at(5), Retention.PINNED)
        with pytest.raises(PromiseRefused):
            put(warehouse, model, above, hint=Hint("b", Retention.PINNED))  # there is more before
        assert core.promises.refused == 3
        assert (core.promised_bytes, status(warehouse, Retention.PINNED)["bytes"]) == (0, 0)
        assert put(warehouse, model, names).held == 6
        warehouse.set_retention(model.id, names.hash_at(5), Retention.PINNED)
        assert status(warehouse, Retention.PINNED)["bytes"] == 6 * BLOCK
        assert_sound(warehouse)


def test_a_pinned_chain_that_meets_its_tail_pins_no_more_than_may_be(
    scratch: Path, total: int
) -> None:
    with at(Time(), scratch, limited(5, total)) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.slice(4, 6))
        put(warehouse, model, names.head(3), retention=Retention.PINNED)
        with pytest.raises(PromiseRefused):
            put(warehouse, model, names.slice(3, 4))  # the session goes on to the tail's end
        assert status(warehouse, Retention.PINNED)["bytes"] == 3 * BLOCK
        assert_sound(warehouse)


def test_a_touch_lets_a_pinned_session_go_on_no_farther_than_may_be_pinned(
    scratch: Path, total: int
) -> None:
    with at(Time(), scratch, limited(5, total)) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = chain_of(model, 8)
        put(warehouse, model, names.head(2), hint=Hint("a", Retention.PINNED))
        put(warehouse, model, names)
        for count, pinned in ((8, 2), (5, 5), (8, 5)):
            warehouse.touch(model, names.head(count), Hint("a"))
            flush(core)
            assert status(warehouse, Retention.PINNED)["blocks"] == pinned
            assert core.promised_bytes == 0
        assert core.promises.refused == 2
        warehouse.touch(model, names, Hint("a", Retention.STANDARD))
        flush(core)
        assert status(warehouse, Retention.PINNED)["blocks"] == 0, "unpinned all the same"
        assert_sound(warehouse)


def test_a_pin_counts_every_shard(scratch: Path, total: int) -> None:
    with at(Time(), scratch, limited(7, total)) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 4)
        for shard in (0, 1):
            put(warehouse, model, names, shard=shard)
        with pytest.raises(PromiseRefused):
            warehouse.set_retention(model.id, names.hash_at(3), Retention.PINNED)
        warehouse.set_retention(model.id, names.hash_at(2), Retention.PINNED)
        assert status(warehouse, Retention.PINNED)["blocks"] == 6


def test_the_clock_never_goes_back_over_a_restart(scratch: Path) -> None:
    late, early = Time(1000 * DAY_MS), Time(5 * DAY_MS)
    with at(late, scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        older = session(warehouse, model, 1, Retention.EPHEMERAL)
    with at(early, scratch) as warehouse:
        newer = session(warehouse, model, 2, Retention.EPHEMERAL)
        stamps = [
            int(warehouse._core.slots.stamp[block_at(warehouse, model, names, 0)[1].slot])
            for names in (older, newer)
        ]
        assert stamps[0] <= stamps[1]
        assert sweep(warehouse) == 0
        early.now_ms = late.now_ms + HOUR_MS
        assert sweep(warehouse) == 8


def test_a_clock_is_no_damaged_stamp() -> None:
    time = Time(7)
    assert Steady(time, STAMP_MS_MAX)() == 7
    steady = Steady(time, 9)
    assert steady() == 9
    time.now_ms = 11
    assert steady() == 11
    time.now_ms = 3
    assert steady() == 11


def test_without_the_file_of_last_uses_times_to_live_begin_anew(scratch: Path) -> None:
    time = Time()
    with at(time, scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = session(warehouse, model, 1, Retention.EPHEMERAL)
    (scratch / "heat").unlink()
    time.now_ms += DAY_MS
    for _ in range(2):  # and a restart is no new beginning
        with at(time, scratch) as warehouse:
            assert sweep(warehouse) == 0
            assert warehouse.lookup(model, names) == 4
        time.now_ms += HOUR_MS // 2
    with at(time, scratch) as warehouse:
        assert sweep(warehouse) == 4


def changed(warehouse: Warehouse) -> tuple[Model, dict[str, Names]]:
    """Sessions whose class was changed after the publish, of every kind."""
    model = warehouse.open_model("m", MHA)
    held = {
        "raised": session(warehouse, model, 1, Retention.STANDARD),
        "lowered": session(warehouse, model, 2, Retention.DURABLE),
        "asked": session(warehouse, model, 3, Retention.PINNED),
        "named": chain_of(model, 4, 4),
        "inner": chain_of(model, 4, 5),
        "grown": chain_of(model, 4, 6),
        "touched": session(warehouse, model, 7, Retention.STANDARD),
    }
    put(warehouse, model, held["named"], hint=Hint("a"))
    put(warehouse, model, held["inner"])
    put(warehouse, model, held["grown"].head(2), hint=Hint("b", Retention.DURABLE))
    warehouse.set_retention(model.id, held["raised"].hash_at(3), Retention.PINNED)
    warehouse.set_retention(model.id, held["lowered"].hash_at(3), Retention.EPHEMERAL)
    warehouse.retain(model.id, "a", Retention.DURABLE)
    warehouse.set_retention(model.id, held["inner"].hash_at(1), Retention.PINNED)
    warehouse.retain(model.id, "b", Retention.EPHEMERAL)
    put(warehouse, model, held["grown"], hint=Hint("b"))
    warehouse.touch(model, held["touched"], Hint("c", Retention.DURABLE))
    flush(warehouse._core)
    keep_classes(warehouse._core)
    return model, held


def seen(warehouse: Warehouse, model: Model, held: dict[str, Names]) -> dict[str, list[int]]:
    """The classes of all blocks."""
    return {
        name: [
            int(warehouse._core.slots.retention[block_at(warehouse, model, names, i)[1].slot])
            for i in range(4)
        ]
        for name, names in held.items()
    }


MEANT = {
    "raised": [3] * 4, "lowered": [0] * 4, "asked": [3] * 4, "named": [2] * 4,
    "inner": [3, 3, 1, 1], "grown": [0] * 4, "touched": [2] * 4,
}  # fmt: skip


def test_classes_outlive_a_restart(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, held = changed(warehouse)
        assert seen(warehouse, model, held) == MEANT
    with open_warehouse(scratch) as warehouse:
        assert seen(warehouse, model, held) == MEANT


def test_classes_outlive_the_metadata(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        _, held = changed(warehouse)
    shutil.rmtree(scratch / "meta")
    rebuild(scratch)
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        assert seen(warehouse, model, held) == MEANT
        warehouse.retain(model.id, "a", Retention.EPHEMERAL)  # with the id that it had
        assert seen(warehouse, model, held)["named"] == [0] * 4
        assert sweep(warehouse) == 0, "when they were used last nobody knows"


class Cut(Exception):
    """The power went."""


@pytest.mark.parametrize("cut", ["before the roster", "between roster and tables"])
@pytest.mark.parametrize("retention", [Retention.PINNED, Retention.EPHEMERAL])
def test_a_power_cut_in_a_change_of_class_does_all_of_it_or_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, cut: str, retention: Retention
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names, other = (session(warehouse, model, seed, Retention.STANDARD) for seed in (1, 2))
        warehouse.set_retention(model.id, other.hash_at(3), Retention.DURABLE)
    cut_warehouse = Warehouse.open(scratch)
    core = cut_warehouse._core
    right = core.write_roster

    def write(_: Any, roster: Any) -> None:
        if cut == "between roster and tables" and roster.classes != core.roster.classes:
            right(roster)
            raise Cut
        if roster.classes != core.roster.classes:
            raise Cut
        right(roster)

    with monkeypatch.context() as patch:
        patch.setattr(type(core), "write_roster", write)
        with pytest.raises(Cut):
            cut_warehouse.set_retention(model.id, names.hash_at(3), retention)
        cut_warehouse.close()
    with open_warehouse(scratch) as warehouse:
        rank = retention.rank if cut == "between roster and tables" else Retention.STANDARD.rank
        found = seen(warehouse, model, {"it": names, "other": other})
        assert found == {"it": [rank] * 4, "other": [Retention.DURABLE.rank] * 4}
        warehouse.set_retention(model.id, names.hash_at(3), Retention.DURABLE)
        assert seen(warehouse, model, {"it": names})["it"] == [2] * 4


def test_classes_that_the_devices_do_not_take_now_are_written_later(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at(Time(), scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        names = session(warehouse, model, 1, Retention.STANDARD)
        put(warehouse, model, names, hint=Hint("a", Retention.DURABLE))
        assert len(core.unkept) == 1

        def fail(*_: Any) -> None:
            raise DeviceError("no")

        with monkeypatch.context() as patch:
            patch.setattr(type(core), "write_roster", fail)
            with pytest.raises(DeviceError):
                keep_classes(core)
        assert len(core.unkept) == 1
    with at(Time(), scratch) as warehouse:
        core = warehouse._core
        keep_classes(core)
        assert not core.unkept
        assert [row.session for row in core.roster.classes] == ["a"]


def test_the_roster_holds_the_classes_of_what_is_there_and_no_more(scratch: Path) -> None:
    with at(Time(), scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        chains = [session(warehouse, model, seed, Retention.STANDARD) for seed in range(6)]
        for names in chains:
            warehouse.set_retention(model.id, names.hash_at(3), Retention.DURABLE)
        assert len(core.roster.classes) == 6
        warehouse.remove(model.id, chains[0].hash_at(3))
        warehouse.set_retention(model.id, chains[1].hash_at(3), Retention.STANDARD)
        assert len(core.roster.classes) == 4
        put(warehouse, model, chains[2], hint=Hint("a"))
        warehouse.retain(model.id, "a", Retention.EPHEMERAL)
        assert warehouse.forget(model, "a") == 0, "the session without id ends there too"
        assert {row.session for row in core.roster.classes} == {""}


def test_settings_are_read_from_the_warehouses_directory(scratch: Path) -> None:
    with open_warehouse(scratch):
        pass
    (scratch / "twfs.toml").write_text("[retention.ephemeral]\nttl = '7m'\n")
    with open_warehouse(scratch) as warehouse:
        assert status(warehouse, Retention.EPHEMERAL)["ttl_ms"] == 420_000
        assert status(warehouse, Retention.DURABLE)["ttl_ms"] == 30 * DAY_MS
    with open_warehouse(scratch, config=Config()) as warehouse:
        assert status(warehouse, Retention.EPHEMERAL)["ttl_ms"] == HOUR_MS
