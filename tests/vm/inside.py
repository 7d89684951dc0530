"""Inside the guest of run.py: `inside.py paths`, `write SEED CHAINS...`, `verify CHAINS...`.

A chain is SEED,FORK,BLOCKS as in support.crashing. Lines for run.py begin with a word in capitals.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / part) for part in ("", "tests", "mount", "tools")]

import numpy as np  # noqa: E402

from support.warehouses import MHA, chain_of, payload_of, payloads_of, put, read_all  # noqa: E402
from twfs.client import connect  # noqa: E402
from twfs.devices.formatting import DeviceSpec  # noqa: E402
from twfs.errors import DeviceError, TwfsError, WarehouseBusy, WarehouseFull  # noqa: E402
from twfs.prefix import Names  # noqa: E402
from twfs.store import Model, PutOutcome, Store  # noqa: E402
from twfs.warehouse import Warehouse  # noqa: E402

NVME, META = Path("/dev/nvme0n1"), Path("/dev/nvme1n1")
HOME: Final = Path("/home/twvm")
MOUNT: Final = Path("/mnt/tw")
CHAINS_MAX: Final = 40  # all of them fit the device


def say(word: str, what: Any = "") -> None:
    """Write a line to the serial console."""
    sys.stdout.write(f"\n{word} {what}\n")
    sys.stdout.flush()


def sh(*words: str | Path) -> str:
    """Run a command that must succeed."""
    return subprocess.run(
        list(map(str, words)), check=True, capture_output=True, text=True
    ).stdout.strip()


def twfs(*words: str | Path) -> str:
    """Run the command line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:4])}
    done = subprocess.run(
        [sys.executable, "-m", "twfs_tools.cli", *map(str, words)], check=False,
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def hits(store: Store, model: Model, names: Names) -> int:
    """Match and read as an engine does; every hit must have its bytes. Blocks that were hits."""
    with store.match(model, names) as match:
        into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(match.blocks)]
        report = match.read_into(into)
    for index in range(report.blocks):
        assert bytes(into[index]) == payload_of(MHA, names.hash_at(index)).tobytes()
    return report.blocks


def paths() -> None:
    """The command line, the mount and a client on the namespace itself."""
    say("DRIVER", sh("readlink", "-f", "/sys/class/block/nvme0n1/device/device/driver"))
    HOME.mkdir(parents=True)
    MOUNT.mkdir(parents=True)
    for step in (create_and_serve, restart_and_check, claimed, drops, fails):
        began = time.monotonic()
        told = step()
        say("STEP", json.dumps({
            "step": step.__name__, "told": told, "seconds": round(time.monotonic() - began, 1),
        }))  # fmt: skip


def create_and_serve() -> dict[str, Any]:
    """create, mount, put by a client, ls, du, sha256sum, read by a client."""
    twfs("create", HOME, "--device", NVME)
    twfs("mount", HOME, MOUNT)
    with connect(HOME / "socket", arena_bytes=8 << 20, match_timeout_s=20) as client:
        model = client.open_model("m", MHA)
        names = chain_of(model, 64)
        assert client.put(model, names, payloads_of(MHA, names)).held == 64
        assert hits(client, model, names) == 64
    files = sorted(MOUNT.glob("m/*/*.kv"))
    assert len(files) == 64
    for index, file in enumerate(files):
        assert file.read_bytes() == payload_of(MHA, names.hash_at(index)).tobytes()
    listed = sh("ls", "-lR", MOUNT).count(".kv")
    sh("umount", MOUNT)
    return {"files": listed}


def restart_and_check() -> dict[str, Any]:
    """All is there after a restart, and the checker finds nothing."""
    with closed_in_time() as warehouse:
        model = warehouse.open_model("m")
        assert read_all(warehouse, model, chain_of(model, 64)) == 64
        assert warehouse.check(data=True).findings == ()
    return {"blocks": 64}


class closed_in_time:  # noqa: N801 - used as a context manager
    """Open the warehouse once a daemon that is ending has let go of it."""

    def __enter__(self) -> Warehouse:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.warehouse = Warehouse.open(HOME)
            except WarehouseBusy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return self.warehouse

    def __exit__(self, *_: object) -> None:
        self.warehouse.close()


def claimed() -> dict[str, Any]:
    """Nobody formats a device that is in use."""
    with Warehouse.open(HOME):
        done = subprocess.run(
            ["mkfs.ext4", "-q", "-F", str(NVME)], check=False, capture_output=True, text=True
        )
        assert done.returncode != 0, "mkfs took a device in use"
    return {"mkfs": done.stderr.strip().splitlines()[0][:80]}


def flakey(table: str) -> None:
    """Put dm-flakey over the namespace, or change what it does."""
    length = sh("blockdev", "--getsz", NVME)
    text = table.format(length=length, device=NVME)
    if Path("/dev/mapper/fl").exists():
        sh("dmsetup", "suspend", "--noflush", "--nolockfs", "fl")
        sh("dmsetup", "reload", "fl", "--table", text)
        sh("dmsetup", "resume", "fl")
    else:
        sh("dmsetup", "create", "fl", "--table", text)
        sh("dmsetup", "mknodes")


LINEAR: Final = "0 {length} linear {device} 0"


def fresh(directory: Path) -> None:
    """A new warehouse on the flakey device, which works for now."""
    flakey(LINEAR)
    Warehouse.create(directory, [DeviceSpec(Path("/dev/mapper/fl"))], force=True)


def drops() -> dict[str, Any]:
    """A drive that says yes and drops writes: misses, found by the checker, never wrong bytes.

    The chain is one that was never on this drive: bytes of an earlier warehouse would be right.
    """
    directory = HOME.with_name("drops")
    fresh(directory)
    with Warehouse.open(directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 8, 7))
        flakey("0 {length} flakey {device} 0 0 1 1 drop_writes")
        put(warehouse, model, chain_of(model, 16, 7))
        flakey(LINEAR)
        found = len(warehouse.check(data=True).findings)
        held = hits(warehouse, model, chain_of(model, 16, 7))
        assert held == 8, held
        assert found >= 8, found
    return {"hits": held, "findings": found}


def fails() -> dict[str, Any]:
    """A drive that fails writes, then everything: errors and misses, and it serves again after."""
    directory = HOME.with_name("fails")
    fresh(directory)
    with Warehouse.open(directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 8, 9))
        flakey("0 {length} flakey {device} 0 0 1 1 error_writes")
        told = outcome(lambda: put(warehouse, model, chain_of(model, 16, 9)).outcomes)
        assert PutOutcome.PUBLISHED not in told, told
        assert hits(warehouse, model, chain_of(model, 16, 9)) == 8
        flakey("0 {length} error")
        assert hits(warehouse, model, chain_of(model, 16, 9)) == 0
        flakey(LINEAR)
    with Warehouse.open(directory) as warehouse:
        model = warehouse.open_model("m")
        assert put(warehouse, model, chain_of(model, 16, 9)).held == 16
        assert hits(warehouse, model, chain_of(model, 16, 9)) == 16
        assert warehouse.check(data=True).findings == ()
    return {"put": sorted(set(map(str, told)))}


def outcome(act: Callable[[], Any]) -> Any:
    """What *act* returns, or the error of ours that it raises."""
    try:
        return act()
    except (DeviceError, WarehouseFull) as error:
        return (type(error).__name__,)


def mounted() -> Path:
    """The metadata's filesystem, made for the first guest."""
    home = Path("/mnt/meta")
    home.mkdir(parents=True, exist_ok=True)
    with suppress(subprocess.CalledProcessError):
        sh("mount", META, home)
        return home / "warehouse"
    sh("mkfs.ext4", "-q", "-F", META)
    sh("mount", META, home)
    return home / "warehouse"


def verify(warehouse: Warehouse, model: Model, chains: list[str]) -> None:
    """All that earlier guests reported is there, and nothing is wrong."""
    for chain in chains:
        own, fork, blocks = map(int, chain.split(","))
        names = chain_of(model, blocks, own, fork=None if fork < 0 else fork)
        held = read_all(warehouse, model, names)
        if held != blocks:
            say("PROBLEM", f"chain {chain} has {held} blocks")
    for finding in warehouse.check(data=True).findings:
        say("PROBLEM", f"I{finding.invariant}: {finding.text}")
    say("VERIFIED", len(chains))


def write(seed: str, chains: list[str]) -> None:
    """Verify, then put chains until the power goes."""
    directory = mounted()
    if not (directory / "meta" / "data.mdb").exists():
        if chains:
            say("PROBLEM", "the warehouse is gone")
        Warehouse.create(directory, [DeviceSpec(NVME)], force=True)
    chance = random.Random(seed)
    with Warehouse.open(directory) as warehouse:
        model = warehouse.open_model("m", MHA)
        verify(warehouse, model, chains)
        while True:
            own, blocks = chance.randrange(1, CHAINS_MAX), chance.randrange(1, 9)
            assert put(warehouse, model, chain_of(model, blocks, own)).held == blocks
            say("PUT", f"{own},-1,{blocks}")


def main(what: str, *arguments: str) -> None:
    """Run one of the three."""
    if what == "paths":
        paths()
    elif what == "write":
        write(arguments[0], list(arguments[1:]))
    else:
        with Warehouse.open(mounted()) as warehouse:
            verify(warehouse, warehouse.open_model("m"), list(arguments))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (TwfsError, AssertionError, subprocess.CalledProcessError) as error:
        say("PROBLEM", f"{type(error).__name__}: {error}: {getattr(error, 'stderr', '')}")
        raise
