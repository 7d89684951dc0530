"""Relaxed durability gives away one commit, and nothing that would cost another's bytes.

What a commit freed is written again, and a number it made is used, only once no power cut can undo
the commit (I19, I20); a removal and a new epoch have returned only then. Strict never waits twice.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import ENVIRONMENT, document, made_warehouse, twfs
from support.warehouses import MHA, chain_of, make_warehouse, open_warehouse, put, read_all, settle
from twfs.devices.device import Device
from twfs.errors import InvalidInput
from twfs.metadata.environment import Metadata
from twfs.records import HEADER_MAGIC, Header
from twfs.store import Durability
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse
from twfs_tools.process import daemon_command


def at_each_sync(patch: pytest.MonkeyPatch, look: Callable[[Metadata], None]) -> None:
    """Call *look* before each sync that makes the last commit certain."""
    right = Metadata._force

    def force(metadata: Metadata) -> None:
        look(metadata)
        right(metadata)

    patch.setattr(Metadata, "_force", force)


@pytest.mark.parametrize("how", ["remove", "evict", "lease"])
def test_space_that_was_freed_is_free_once_that_is_certain(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with open_warehouse(scratch, durability="relaxed") as warehouse:
        model, allocator = warehouse.open_model("m", MHA), warehouse._core.allocator
        names = chain_of(model, 4)
        put(warehouse, model, names)
        full, seen = allocator.free_bytes, list[int]()
        at_each_sync(monkeypatch, lambda _: seen.append(allocator.free_bytes))
        if how == "evict":
            warehouse.evict(ByteCount(1 << 20))
        elif how == "remove":
            warehouse.remove(model.id, names.hash_at(3))
        else:
            match = warehouse.match(model, names)
            warehouse.remove(model.id, names.hash_at(3))
            assert allocator.free_bytes == full  # in limbo
            seen.clear()
            match.release()
            settle(warehouse)
        assert seen[0] == full  # committed by then, and not given away
        assert allocator.free_bytes == full + 4 * 8192
        assert put(warehouse, model, chain_of(model, 4, 1)).held == 4


def test_a_number_is_used_once_its_range_is_certain(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certain: list[int] = []
    used: list[int] = []

    def look(metadata: Metadata) -> None:
        with metadata.read() as view:
            certain.append(view.counter("generation"))

    write = Device.write_from

    def write_from(device: Device, buffers: Any, offset: Any) -> None:
        for buffer in buffers:
            if bytes(buffer[: len(HEADER_MAGIC)]) == HEADER_MAGIC:
                generation = Header.unpack(bytes(buffer[:ALIGN])).block.generation
                used.append(generation)
                assert generation < certain[-1]
        write(device, buffers, offset)

    at_each_sync(monkeypatch, look)
    monkeypatch.setattr(Device, "write_from", write_from)
    with open_warehouse(scratch, durability="relaxed") as warehouse:
        model = warehouse.open_model("m", MHA)
        assert put(warehouse, model, chain_of(model, 4)).held == 4
    assert len(used) == 4


def test_an_epoch_has_ended_for_certain_when_the_call_returns(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch, durability="relaxed") as warehouse:
        model = warehouse.open_model("m", MHA)
        synced: list[int | None] = []

        def look(metadata: Metadata) -> None:
            with metadata.read() as view:
                synced.append(view.model_id("m"))

        at_each_sync(monkeypatch, look)
        fresh = warehouse.new_epoch(model)
        assert synced[-1] == fresh.id


def test_a_publish_waits_for_no_sync_in_relaxed_and_strict_needs_none(scratch: Path) -> None:
    for durability in Durability:
        with open_warehouse(scratch / durability, durability=durability) as warehouse:
            assert warehouse.statistics()["durability"] == durability
            model = warehouse.open_model("m", MHA)
            put(warehouse, model, chain_of(model, 1))
            before = warehouse.statistics()["metadata"]["syncs"]
            for blocks in range(2, 6):
                put(warehouse, model, chain_of(model, blocks))
            assert warehouse.statistics()["metadata"]["syncs"] == before
            assert before == 0 or durability is Durability.RELAXED


def test_each_mode_opens_what_the_other_has_left(scratch: Path) -> None:
    for turn in range(1, 5):
        durability = Durability.RELAXED if turn % 2 else Durability.STRICT
        with open_warehouse(scratch, durability=durability) as warehouse:
            model = warehouse.open_model("m", MHA)
            assert read_all(warehouse, model, chain_of(model, turn)) == turn - 1
            put(warehouse, model, chain_of(model, turn))


def test_an_unknown_mode_is_refused_in_a_sentence(scratch: Path) -> None:
    make_warehouse(scratch)
    with pytest.raises(InvalidInput, match="strict or relaxed, not 'never'"):
        Warehouse.open(scratch, durability="never")
    Warehouse.open(scratch).close()  # and nothing is left locked
    for module, arguments in (
        ("twfs_tools.cli", ("serve", scratch, "--no-mount")), ("twfs_mount.main", (scratch,)),
    ):  # fmt: skip
        done = twfs(*arguments, "--durability", "never", module=module)
        assert done.returncode == 2
        assert "never" in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_takes_the_mode_and_status_shows_it(tmp_path: Path) -> None:
    made_warehouse(tmp_path / "w")
    assert "--durability" not in daemon_command(tmp_path)  # strict is the default
    arguments = ["serve", str(tmp_path / "w"), "--no-mount", "--durability", "relaxed"]
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "twfs_tools.cli", *arguments],
        stderr=writing, env=ENVIRONMENT,
    ) as daemon, os.fdopen(reading) as log:  # fmt: skip
        os.close(writing)
        try:
            assert any("listening" in line for line in log)
            assert document("status", tmp_path / "w")["statistics"]["durability"] == "relaxed"
            assert "relaxed" in twfs("status", tmp_path / "w").stdout
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()  # it says so, to a pipe that must still be there
    assert daemon.returncode == 0
