"""A purge: blocks and their bytes are gone, what others use stays, no rebuild brings it back."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cli import ENVIRONMENT, twfs
from support.daemon import Daemon, client_of, running_daemon
from support.loops import loop_device, needs_loops
from support.rebuilding import assert_back, state_of
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    assert_sound,
    block_at,
    chain_of,
    flip_payload,
    open_warehouse,
    payload_of,
    put,
    read_all,
    settle,
    stop_tending,
)
from twfs.admin.purging import Purge, rows_of
from twfs.admin.usage import By, usage
from twfs.devices.device import Device
from twfs.devices.formatting import DeviceSpec
from twfs.errors import (
    DeviceError,
    InvalidInput,
    NoSuchBlock,
    NoSuchModel,
    NoSuchTenant,
    NotAllowed,
)
from twfs.hints import Hint
from twfs.policy import recording
from twfs.policy.accesses import Kind, read_record, read_segment
from twfs.prefix import Names
from twfs.recovery.rebuild import rebuild
from twfs.store import Model
from twfs.units import ALIGN
from twfs.warehouse import Warehouse
from twfs_tools.purge import EXIT_LEFT

OWNER, ENGINE, STRANGER = 5001, 5002, 5003
NOTHING_WAITS = {"purges": [], "leased_bytes": 0, "left_on_devices": []}


def marks_of(model: Model, names: Names) -> list[bytes]:
    """Of each block a part of its payload that no other block has."""
    return [
        payload_of(MHA, names.hash_at(index)).tobytes()[1024:1088] for index in range(len(names))
    ]


def found_in(directory: Path, marks: list[bytes]) -> int:
    """How many of *marks* lie anywhere on the raw devices."""
    raw = b"".join(path.read_bytes() for path in sorted(directory.glob("*.img")))
    assert raw
    return sum(mark in raw for mark in marks)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("can_clear", [False, True])
def test_no_byte_of_a_purged_session_is_left_on_the_raw_image_and_what_it_shared_is(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, *, overwrite: bool, can_clear: bool
) -> None:
    if not can_clear:
        monkeypatch.setattr(Device, "clear", lambda *_: False)
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        stays, goes = chain_of(model, 6), chain_of(model, 10, 3, fork=4)
        put(warehouse, model, stays)
        put(warehouse, model, goes, hint=Hint(session="tiger"))
        marks = marks_of(model, goes)
        assert found_in(scratch, marks) == 10
        counted = warehouse.operate("purge", session="tiger", dry_run=True)
        assert (counted["purged_blocks"], counted["shared_blocks"]) == (6, 4)
        assert read_all(warehouse, model, goes) == 10
        done = warehouse.operate("purge", session="tiger", overwrite=overwrite)
        assert (done["purged_blocks"], done["shared_blocks"], done["sessions"]) == (6, 4, 1)
        assert done["erased_bytes"] == done["purged_bytes"] == counted["purged_bytes"]
        erased = {"discarded_bytes": done["discarded_bytes"]}
        zeros = overwrite or not can_clear
        assert done["overwritten_bytes" if zeros else "discarded_bytes"] == done["purged_bytes"]
        assert not (erased["discarded_bytes"] and zeros)
        assert done["complete"] == (overwrite or can_clear)  # else free space is as it was
        assert found_in(scratch, marks) == 4
        assert found_in(scratch, marks[:4]) == 4
        assert read_all(warehouse, model, goes) == 4
        assert read_all(warehouse, model, stays) == 6
        with pytest.raises(NoSuchBlock):
            warehouse.operate("purge", session="tiger")
        settle(warehouse)
        assert_sound(warehouse)
        before = state_of(warehouse)
    rebuild(scratch, force=True)
    with open_warehouse(scratch) as warehouse:
        assert_back(before, state_of(warehouse), exactly=True)
        assert read_all(warehouse, warehouse.open_model("m"), goes) == 4


@needs_loops
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_purge_reaches_the_drive(scratch: Path, *, overwrite: bool) -> None:
    """A discard of a loop device is a hole in its file: what the drive was told is seen there."""
    backing = scratch / "backing"
    with loop_device(backing, DEVICE_BYTES) as device:
        Warehouse.create(scratch, [DeviceSpec(device)])
        with Warehouse.open(scratch) as warehouse:
            model = warehouse.open_model("m", MHA)
            names = chain_of(model, 10)
            before = backing.stat().st_blocks
            put(warehouse, model, names, hint=Hint(session="tiger"))
            marks = marks_of(model, names)
            assert sum(mark in backing.read_bytes() for mark in marks) == 10
            done = warehouse.operate(
                "purge", session="tiger", overwrite=overwrite, free_space=False
            )
            assert done["complete"]
            assert done["overwritten_bytes"] == (done["purged_bytes"] if overwrite else 0)
            assert done["discarded_bytes"] == (0 if overwrite else done["purged_bytes"])
            raw = backing.read_bytes()
            assert not any(mark in raw for mark in marks)
            # Discarded are holes, but for the first 4 KiB of each, which are overwritten anyway.
            taken = (backing.stat().st_blocks - before) * 512
            assert taken >= done["purged_bytes"] if overwrite else taken <= 16 * ALIGN
            put(warehouse, model, names)
            assert read_all(warehouse, model, names) == 10
            assert_sound(warehouse)


def test_a_purge_erases_earlier_copies_in_free_space_too(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 8)
        put(warehouse, model, names)
        marks = marks_of(model, names)
        warehouse.evict(warehouse.space().total_bytes)
        assert found_in(scratch, marks) == 8  # evicted, and lying there still
        put(warehouse, model, chain_of(model, 4))
        done = warehouse.operate("purge", model="m")
        assert done["purged_blocks"] == 4
        assert done["free_discarded_bytes"] >= warehouse.space().free_bytes > 0
        assert found_in(scratch, marks) == 0
        assert_sound(warehouse)
    assert rebuild(scratch, force=True).accepted == 0


def test_tenant_model_and_age_hold_together_and_others_stay(scratch: Path) -> None:
    now = [1_000_000_000]
    with open_warehouse(scratch, clock=lambda: now[0]) as warehouse:
        for name in ("acme", "zeta"):
            warehouse.operate("tenant-add", name=name, owner=OWNER, uids=[ENGINE])
        chains = {}
        for seed, (name, tenant) in enumerate(
            [("m", "acme"), ("n", "acme"), ("m", "zeta"), ("m", None)]
        ):
            model = warehouse.open_model(name, MHA, tenant=tenant)
            chains[name, tenant] = model, chain_of(model, 3, seed)
            put(warehouse, model, chains[name, tenant][1])
        now[0] += 10_000
        warehouse.touch(*chains["m", "zeta"])
        done = warehouse.operate("purge", tenant="acme", model="n")
        assert done["purged_blocks"] == 3
        assert read_all(warehouse, *chains["n", "acme"]) == 0
        done = warehouse.operate("purge", older_ms=5_000)
        assert done["purged_blocks"] == 6
        assert {key: read_all(warehouse, *chain) for key, chain in chains.items()} == {
            ("m", "acme"): 0, ("n", "acme"): 0, ("m", "zeta"): 3, ("m", None): 0,
        }  # fmt: skip
        settle(warehouse)


def test_an_old_block_with_a_younger_one_below_it_stays(scratch: Path) -> None:
    now = [1_000_000_000]
    with open_warehouse(scratch, clock=lambda: now[0]) as warehouse:
        model = warehouse.open_model("m", MHA)
        names, other = chain_of(model, 6), chain_of(model, 5, 4, fork=3)
        put(warehouse, model, names)
        put(warehouse, model, other)
        now[0] += 10_000
        slots = warehouse._core.slots
        slots.use([block_at(warehouse, model, names, 4)[1].slot], now[0])
        done = warehouse.operate("purge", older_ms=5_000)
        assert (done["purged_blocks"], done["shared_blocks"]) == (3, 4)
        assert read_all(warehouse, model, names) == 5
        assert read_all(warehouse, model, other) == 3


def test_what_a_lease_reads_is_reported_and_erased_when_it_ends(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        put(warehouse, model, names)
        marks = marks_of(model, names)
        with warehouse.match(model, names) as match:
            done = warehouse.operate("purge", model="m")
            assert done["leased_bytes"] == done["purged_bytes"] > 0
            assert not done["complete"]
            assert warehouse.lookup(model, names) == 0  # unpublished at once
            assert found_in(scratch, marks) == 5
            assert match.blocks == 5
            assert warehouse.operate("purges") == {
                "purges": [], "leased_bytes": done["purged_bytes"], "left_on_devices": [],
            }  # fmt: skip
        settle(warehouse)
        warehouse.purger.tend()
        warehouse.purger._thread.submit(lambda: None).result()
        assert found_in(scratch, marks) == 0
        assert warehouse.operate("purges") == NOTHING_WAITS
        settle(warehouse)
        assert_sound(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def test_a_device_that_fails_is_reported_and_the_next_start_erases_it(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise DeviceError("it burns")

    with open_warehouse(scratch) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 5)
        put(warehouse, model, names)
        marks = marks_of(model, names)
        with monkeypatch.context() as patch:
            patch.setattr(Device, "write_from", fails)
            done = warehouse.operate("purge", model="m", free_space=False)
        assert done["left_on_devices"] == [
            {"device": 0, "bytes": done["purged_bytes"], "why": "it burns"}
        ]
        assert not done["complete"]
        assert warehouse.operate("purges") == NOTHING_WAITS | {
            "left_on_devices": done["left_on_devices"]
        }
        assert usage(warehouse._core, By.TENANT, 10).adds_up
        assert found_in(scratch, marks) == 5
    with open_warehouse(scratch) as warehouse:
        warehouse.purger._thread.submit(lambda: None).result()
        assert found_in(scratch, marks) == 0
        settle(warehouse)
        assert warehouse.space().free_bytes == warehouse.space().total_bytes


def accesses(warehouse: Warehouse) -> list[tuple[int, int, int, int]]:
    """Model, tenant, kind and samples of every row of the access record."""
    noted = read_record(Path(warehouse.operate("record")["record"]))
    return [tuple(row) for row in noted.rows[["model", "tenant", "kind", "samples"]].tolist()]


def test_a_purge_takes_who_asked_out_of_the_access_record_too(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        stop_tending(warehouse)
        model, other = warehouse.open_model("m", MHA), warehouse.open_model("n", MHA)
        trunk = chain_of(model, 6)
        goes, evicted = chain_of(model, 10, 3, fork=4), chain_of(model, 3, 9)
        put(warehouse, model, trunk)
        put(warehouse, model, goes, hint=Hint(session="tiger"))
        for names in (trunk, goes, evicted, goes.head(4)):
            with warehouse.match(model, names):
                pass
        with warehouse.match(other, chain_of(other, 2)):
            pass
        asked = [
            (1, 0, Kind.PUT, 6),
            (1, 0, Kind.PUT, 6),
            *[(1, 0, Kind.MATCH, n) for n in (6, 10, 3, 4)],
        ]
        asked = [*asked, (2, 0, Kind.MATCH, 2)]
        assert accesses(warehouse) == asked
        [segment] = (scratch / "record").iterdir()
        with segment.open("rb") as old:
            done = warehouse.operate("purge", session="tiger")
            assert done["erased_accesses"] == 2
            assert not any(old.read()), "what was there is overwritten"
        assert accesses(warehouse) == [asked[0], asked[2], *asked[4:]], (
            "what it shared is others' too"
        )
        assert warehouse.operate("purge", model="m")["erased_accesses"] == 4
        assert accesses(warehouse) == [asked[-1]]
        put(warehouse, model, trunk)
        assert accesses(warehouse) == [asked[-1], asked[0]], "and it goes on"
    assert [group.level for group in read_segment(segment)[0]] == [0, 0]


def test_a_record_that_cannot_be_written_is_no_complete_purge(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 4))
        warehouse.operate("record")
        with monkeypatch.context() as patch:
            patch.setattr(recording, "_replace_wiped", fails_to_write)
            done = warehouse.operate("purge", model="m")
        assert (done["complete"], done["purged_blocks"], done["erased_accesses"]) == (False, 4, 0)
        assert done["notes"] == ["the access record was not erased: No space left on device"]


def fails_to_write(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_purge_under_way_is_listed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Any] = []
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 4), hint=Hint(session="tiger"))
        right = Device.flush

        def flush(device: Device) -> None:
            listed.append(warehouse.operate("purges"))
            right(device)

        monkeypatch.setattr(Device, "flush", flush)
        done = warehouse.operate("purge", session="tiger", model="m", free_space=False)
        monkeypatch.undo()
        [seen] = listed
        [purge] = seen["purges"]
        assert (purge["number"], purge["model"], purge["tenant"]) == (done["number"], "m", None)
        assert (purge["sessions"], purge["before_ms"]) == (["tiger"], None)
        assert [each["bytes"] for each in seen["left_on_devices"]] == [done["purged_bytes"]]
        assert warehouse.operate("purges") == NOTHING_WAITS


def test_extents_are_free_only_after_the_flush_and_the_row_goes_last(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    with open_warehouse(scratch) as warehouse:
        core = warehouse._core
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 4)
        put(warehouse, model, names)
        right = Device.flush

        def flush(device: Device) -> None:
            with core.metadata.read() as view:
                seen.append(("flush", len(rows_of(view)), view.count("blocks")))
            assert core.doomed
            right(device)

        monkeypatch.setattr(Device, "flush", flush)
        warehouse.operate("purge", model="m", free_space=False)
        monkeypatch.undo()
        assert seen == [("flush", 1, 0)]
        assert not core.doomed
        with core.metadata.read() as view:
            assert rows_of(view) == []


def test_only_operators_and_the_owner_of_a_tenant_purge(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[ENGINE])
        mine = warehouse.open_model("m", MHA, tenant="acme")
        others = warehouse.open_model("m", MHA)
        for model in (mine, others):
            put(warehouse, model, chain_of(model, 3), hint=Hint(session="s"))
        purger = warehouse.purger
        for uid, asked in (
            (STRANGER, Purge(tenant="acme")), (ENGINE, Purge(tenant="acme")),
            (OWNER, Purge(model="m")), (OWNER, Purge(session="s")), (OWNER, Purge(tenant="other")),
            (OWNER, Purge(tenant="everybody")),
        ):  # fmt: skip
            with pytest.raises(NotAllowed):
                purger.purge(asked, uid=uid)
        assert read_all(warehouse, mine, chain_of(mine, 3)) == 3
        done = purger.purge(Purge(tenant="acme", session="s"), uid=OWNER)
        assert done["purged_blocks"] == 3
        assert read_all(warehouse, others, chain_of(others, 3)) == 3


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, InvalidInput), ({"session": "s", "older_ms": 1}, InvalidInput),
        ({"model": "none"}, NoSuchModel), ({"session": "none"}, NoSuchBlock),
        ({"tenant": "none"}, NoSuchTenant), ({"model": "m", "wait_ms": -1}, InvalidInput),
        ({"model": "m", "what": 1}, InvalidInput),
    ],
)  # fmt: skip
def test_a_purge_of_nothing_that_is_there_is_refused_and_changes_nothing(
    scratch: Path, given: dict[str, Any], error: type[Exception]
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
        with pytest.raises(error):
            warehouse.operate("purge", **given)
        assert read_all(warehouse, model, chain_of(model, 3)) == 3


def in_daemon(daemon: Daemon, uid: int, **asked: Any) -> Any:
    """Purge over the socket as *uid*."""
    with client_of(daemon, uid) as client:
        return client.operate("purge", **asked)


@pytest.mark.skipif(os.geteuid() != 0, reason="clients of other users need root")
def test_a_daemon_purges_for_operators_and_owners_and_for_nobody_else(scratch: Path) -> None:
    with running_daemon(scratch) as daemon, client_of(daemon, 0) as engine:
        scratch.chmod(0o711)
        daemon.socket.chmod(0o666)
        engine.operate("tenant-add", name="acme", owner=OWNER, uids=[ENGINE])
        model = engine.open_model("m", MHA, tenant="acme")
        names = chain_of(model, 4)
        payloads = [payload_of(MHA, names.hash_at(index)) for index in range(4)]
        assert engine.put(model, names, payloads).held == 4
        for uid in (ENGINE, STRANGER):
            with pytest.raises(NotAllowed):
                in_daemon(daemon, uid, tenant="acme")
        with pytest.raises(NotAllowed):
            in_daemon(daemon, OWNER, model="m")
        with client_of(daemon, OWNER) as client, pytest.raises(NotAllowed):
            client.operate("purges")  # of everybody
        assert engine.lookup(model, names) == 4
        assert in_daemon(daemon, OWNER, tenant="acme")["purged_blocks"] == 4
        assert engine.lookup(model, names) == 0
        assert engine.put(model, names, payloads).held == 4
        assert engine.operate("purge", model="m", wait_ms=1000)["complete"]


DYING = """
import os, sys
from pathlib import Path
from twfs.admin import purging, shredding
from twfs.devices.device import Device
from twfs.metadata.environment import Metadata
from twfs.warehouse import Warehouse

purging.BATCH_BLOCKS = shredding.BATCH_EXTENTS = 2
left = [10**9]

def dying(right):
    def call(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), 9)
        return right(*args, **more)
    return call

for kind, name in ((Device, "write_from"), (Device, "flush"), (Device, "clear"),
                   (Metadata, "submit"), (Metadata, "settle")):
    setattr(kind, name, dying(getattr(kind, name)))
with Warehouse.open(Path(sys.argv[1])) as warehouse:
    left[0] = int(sys.argv[2])
    warehouse.operate("purge", model="m", overwrite=sys.argv[3] == "1")
    print(int(sys.argv[2]) - left[0])
"""


def purge_until_killed(directory: Path, steps: int, *, overwrite: bool) -> int | None:
    """Purge the model m in another process; its steps, or None if it was killed before so many."""
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(directory), str(steps), str(int(overwrite))],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return int(done.stdout) if done.returncode == 0 else None


def test_a_purge_that_is_killed_at_any_step_ends_at_the_next_start(scratch: Path) -> None:
    chance = random.Random(os.environ.get("TWFS_SEED", "purge"))
    steps, began, killed = 60, 0, 0
    for turn in range(6):
        directory = scratch / str(turn)
        with open_warehouse(directory) as warehouse:
            model, other = warehouse.open_model("m", MHA), warehouse.open_model("n", MHA)
            gone, stays = chain_of(model, 9), chain_of(other, 5, 2)
            put(warehouse, model, gone)
            put(warehouse, other, stays)
            marks = marks_of(model, gone)
        at = 10**6 if turn == 0 else chance.randrange(steps)
        ended = purge_until_killed(directory, at, overwrite=bool(turn % 2))
        steps = ended if turn == 0 and ended is not None else steps
        killed += ended is None
        with open_warehouse(directory) as warehouse:
            warehouse.purger._thread.submit(lambda: None).result()
            settle(warehouse)
            core = warehouse._core
            with core.metadata.read() as view:
                assert rows_of(view) == []
            assert not core.doomed
            held = read_all(warehouse, warehouse.open_model("m"), gone)
            assert held in {0, 9}  # killed before the row was durable, or all is gone
            assert found_in(directory, marks) == held
            began += held == 0
            assert read_all(warehouse, warehouse.open_model("n"), stays) == 5
            assert_sound(warehouse)
        rebuild(directory, force=True)
        with open_warehouse(directory) as warehouse:
            assert read_all(warehouse, warehouse.open_model("n"), stays) == 5
            if not held:
                assert all(info.blocks == 0 for info in warehouse.models() if info.name == "m")
    assert killed >= 3  # how many steps there are depends on what the warehouse does meanwhile
    assert began > 1


def test_the_command_asks_counts_purges_and_tells_by_its_code_what_was_left(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 4))
    place = ("purge", scratch, "--model", "m")
    assert "4 blocks" in twfs(*place, "--dry-run").stdout
    assert twfs(*place).returncode != 0  # nobody answers yes
    done = twfs(*place, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["purged_blocks"] == 4
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m")
        put(warehouse, model, chain_of(model, 4))
        block = block_at(warehouse, model, chain_of(model, 4), 3)
        flip_payload(warehouse, block[1])
        assert warehouse.report_block(block[0], block[1].generation)  # a place lost for good
    done = twfs(*place, "--yes", "--overwrite")
    assert done.returncode == EXIT_LEFT
    assert "lost places" in done.stdout
    assert twfs("purge", scratch, "--yes").returncode == InvalidInput.exit_code


def test_the_command_lists_what_waits(scratch: Path) -> None:
    with running_daemon(scratch) as daemon:
        place = ("purge", daemon.directory, "--socket", daemon.socket)
        assert "nothing waits" in twfs(*place, "--list").stdout
        with client_of(daemon, os.geteuid()) as client:
            model = client.open_model("m", MHA)
            names = chain_of(model, 4)
            client.put(model, names, [payload_of(MHA, names.hash_at(at)) for at in range(4)])
            with client.match(model, names):
                left = twfs(*place, "--model", "m", "--yes", "--wait", "0s")
                assert left.returncode == EXIT_LEFT, left.stderr
                assert "being read" in twfs(*place, "--list").stdout
                waits = json.loads(twfs(*place, "--list", "--json").stdout)
                assert waits == NOTHING_WAITS | {"leased_bytes": 4 * 8192}
    assert twfs("purge", scratch, "--list", "--model", "m").returncode == InvalidInput.exit_code
