"""The scrubber's rate is kept, and gives way to everybody else's use of the disks.

Time is a counter that the tests move: nothing here sleeps.
"""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.warehouses import MHA, chain_of, open_warehouse, put, read_all
from twfs.checking import pacing
from twfs.checking.pacing import (
    BURST_BYTES,
    BUSY_BYTES_S,
    CALM_S,
    FOREGROUND_BYTES_S,
    IDLE_BYTES_S,
    READ_COST_BYTES,
    SAMPLE_S,
    Foreground,
    Pacer,
    Stopped,
    moved_bytes,
    statistics_files,
)
from twfs.core.state import Core

MIB = 1 << 20


class Clock:
    """A clock that only waits move, and the event that the scrubber waits for."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ended = False

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        """Let the time pass."""
        assert seconds > 0
        self.now += seconds

    def is_set(self) -> bool:
        return self.ended


def pacer(clock: Clock, *, busy: bool, devices: int = 1) -> Pacer:
    """A pacer over a clock, with others that are always, or never, at work."""
    return Pacer(
        lambda _: busy, lambda: devices, cast(threading.Event, clock), clock=clock
    )  # fmt: skip


def seconds_for(made: Pacer, clock: Clock, byte_count: int) -> float:
    """Time that it takes to read so many bytes in MiB."""
    began = clock.now
    for _ in range(byte_count // MIB):
        made.take(MIB)
    return clock.now - began


@pytest.mark.parametrize("rate", [MIB, 64 * MIB, 3 * MIB + 1])
def test_a_rate_is_kept_to_the_byte(rate: int) -> None:
    clock = Clock()
    made = pacer(clock, busy=True)
    made.rate_bytes_s = rate
    assert seconds_for(made, clock, 256 * MIB) == pytest.approx(256 * MIB / rate)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("busy", "per_device"), [(True, BUSY_BYTES_S), (False, IDLE_BYTES_S)])
def test_without_a_rate_it_depends_on_others_and_on_devices(
    *, busy: bool, per_device: int, devices: int
) -> None:
    clock = Clock()
    made = pacer(clock, busy=busy, devices=devices)
    cost = 256 * (MIB + READ_COST_BYTES)
    assert seconds_for(made, clock, 256 * MIB) == pytest.approx(cost / (devices * per_device))
    assert made.present_bytes_s == devices * per_device


def test_without_a_limit_nothing_waits_and_nothing_is_owed_later() -> None:
    clock = Clock()
    made = pacer(clock, busy=True)
    made.rate_bytes_s = 0
    assert seconds_for(made, clock, 1024 * MIB) == 0
    made.rate_bytes_s = MIB
    assert seconds_for(made, clock, 8 * MIB) <= 8


def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    clock = Clock()
    made = pacer(clock, busy=True)
    made.rate_bytes_s = MIB
    clock.now += 3600
    assert seconds_for(made, clock, 16 * MIB) == pytest.approx((16 * MIB - BURST_BYTES) / MIB)


def test_a_wait_ends_with_the_scrubber() -> None:
    end = threading.Event()
    made = Pacer(lambda _: True, lambda: 1, end)
    made.rate_bytes_s = 1
    timer = threading.Timer(0.01, end.set)
    timer.start()
    with pytest.raises(Stopped):
        made.take(1 << 30)  # a wait of 34 years
    timer.join()


def test_the_disk_below_an_image_counts_what_is_read(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        files = statistics_files(warehouse.devices.values())
        if files is None:
            pytest.skip("the kernel tells nothing about the disk of this filesystem")
        assert len(files) == 1
        before = moved_bytes(files[0])
        path = scratch / "other"
        path.write_bytes(os.urandom(MIB))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        assert moved_bytes(files[0]) - before >= MIB


class Disk:
    """Others' use of a warehouse over one disk, as the kernel and the counters tell it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, told: bool = True) -> None:
        self.clock = Clock()
        self.moved = 1 << 40
        self.leases = 0
        counters = SimpleNamespace(
            matches=0, puts=0, written_bytes=0, mount_reads=0, evicted_blocks=0
        )
        self.counters = counters
        core = SimpleNamespace(
            counters=counters, devices={},
            leases=SimpleNamespace(statistics=lambda: {"leases": self.leases}),
        )  # fmt: skip
        files = [Path("stat")] if told else None
        patch.setattr(pacing, "statistics_files", lambda _: files)
        patch.setattr(pacing, "moved_bytes", lambda _: self.moved)
        self.foreground = Foreground(cast(Core, core), clock=self.clock)
        self.own = 0
        self.busy()
        self.clock.now += CALM_S

    def busy(self, *, own: int = 0, others: int = 0) -> bool:
        """Let a sample's time pass in which so much was read."""
        self.clock.now += SAMPLE_S
        self.own += own
        self.moved += own + others
        return self.foreground.busy(self.own)


def test_its_own_reads_are_no_use_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    assert not any(disk.busy(own=100 * MIB) for _ in range(20))


def test_what_engines_read_themselves_is_use_until_it_has_been_calm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = Disk(monkeypatch)
    assert not disk.busy(others=int(FOREGROUND_BYTES_S * SAMPLE_S * 0.9))
    assert disk.busy(others=int(FOREGROUND_BYTES_S * SAMPLE_S * 1.1), own=MIB)
    for _ in range(int(CALM_S / SAMPLE_S) - 1):
        assert disk.busy()
    disk.clock.now += SAMPLE_S
    assert not disk.busy()


@pytest.mark.parametrize(
    "counter", ["matches", "puts", "written_bytes", "mount_reads", "evicted_blocks"]
)
def test_whatever_the_daemon_does_for_others_is_use(
    monkeypatch: pytest.MonkeyPatch, counter: str
) -> None:
    disk = Disk(monkeypatch)
    assert not disk.busy()
    setattr(disk.counters, counter, 1)
    assert disk.busy()


def test_where_no_disk_tells_a_lease_is_use(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, told=False)
    assert not disk.busy(others=1 << 30)
    disk.leases = 1
    assert disk.busy()


def test_matches_and_puts_of_a_real_warehouse_are_seen(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(pacing, "moved_bytes", lambda _: 0)
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        foreground = Foreground(warehouse._core, clock=clock)

        def busy_after(work: Any) -> bool:
            clock.now += 2 * CALM_S
            assert not foreground.busy(0)
            work()
            clock.now += SAMPLE_S
            return foreground.busy(0)

        foreground.busy(0)
        assert busy_after(lambda: put(warehouse, model, names))
        assert busy_after(lambda: read_all(warehouse, model, names))
        assert busy_after(lambda: warehouse.read_block(
            warehouse.chain_of(model.id, names.hash_at(2))[0]
        ))  # fmt: skip
