"""`twfs bench mount`: what listing and reading the mount costs, first and second time.

The daemon's CPU time is taken from /proc; commands are the real `ls` and `du`.
"""

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from twfs.errors import MountRefused
from twfs.units import align_up
from twfs.warehouse import Warehouse
from twfs_tools.bench.report import (
    GIGABYTE,
    DirectoryOption,
    QuickFlag,
    RoundsOption,
    finish,
    median,
)
from twfs_tools.bench.scratch import (
    Scratch,
    drop_page_cache,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.output import JsonFlag, Steps, parse_size

SESSIONS: Final = 200
SESSION_BLOCKS: Final = 500
LONG_BLOCKS: Final = 7680  # 122,880 tokens in blocks of 16
SMALL_BYTES: Final = 4096
LARGE_BYTES: Final = 8 << 20
READ_BYTES: Final = 1 << 20
READERS: Final = (1, 4)
PUT_BLOCKS: Final = 1920


def mount(
    directory: DirectoryOption = Path("/var/tmp"),
    rounds: RoundsOption = 5,
    wanted: Annotated[str, typer.Option("--bytes", help="Read sequentially.")] = "1G",
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """List 200 sessions of 500 blocks (half shared) and one of 7,680; read sequentially."""
    if not Path("/dev/fuse").exists():
        raise MountRefused("there is no /dev/fuse here: load the module with modprobe fuse")
    sessions, length, long = (4, 10, 50) if quick else (SESSIONS, SESSION_BLOCKS, LONG_BLOCKS)
    large = (32 << 20 if quick else parse_size(wanted)) // LARGE_BYTES
    rounds = 1 if quick else rounds
    small_bytes = (sessions * length + long) * 2 * SMALL_BYTES
    with scratch(directory, small_bytes + large * align_up(LARGE_BYTES + 4096)) as made:
        _build(made, sessions, length, long, large)
        results = _listings(made, rounds) + _reads(made, rounds, large * LARGE_BYTES)
    settings = {
        "sessions": sessions, "session_blocks": length, "long_blocks": long, "rounds": rounds,
        "read_bytes": large * LARGE_BYTES,
    }  # fmt: skip
    finish("mount", directory, settings, results, as_json=as_json)


def _build(made: Scratch, sessions: int, length: int, long: int, large: int) -> None:
    """Fill the warehouse: many sessions over one shared prefix, a long one, a large one."""
    store = made.open_in_process()
    try:
        with Steps("building", sessions + 2) as steps:
            for seed in range(sessions):
                _put(store, "many", SMALL_BYTES, length, seed=seed + 1, shared=length // 2)
                steps.advance()
            _put(store, "long", SMALL_BYTES, long)
            steps.advance()
            _put(store, "large", LARGE_BYTES, large)
    finally:
        store.close()


def _put(
    store: Warehouse, name: str, block_bytes: int, blocks: int, *, seed: int = 1, shared: int = 0
) -> None:
    """Store one session; small ones all with the same payload."""
    model = store.open_model(name, opaque_layout(block_bytes, 16))
    names = random_names(model, blocks, seed, shared)
    if block_bytes == SMALL_BYTES:
        payload = np.random.default_rng(seed).bytes(block_bytes)
        for at in range(0, blocks, PUT_BLOCKS):
            part = names.slice(at, min(blocks, at + PUT_BLOCKS))
            require_stored(store.put(model, part, [payload] * len(part)))
    else:
        require_stored(store.put(model, names, random_payloads(blocks, block_bytes)))


def _listings(made: Scratch, rounds: int) -> list[dict[str, Any]]:
    """Time `ls -l` and `du` against a fresh daemon and mount, and again."""
    times: dict[tuple[str, str, str], list[float]] = {}
    cpu: dict[tuple[str, str, str], list[float]] = {}
    with Steps("listing", rounds * 8) as steps:
        for command in (["ls", "-lR"], ["du", "-s"]):
            for model in ("many", "long"):
                for _ in range(rounds):
                    made.start(mount=True)
                    for when in ("first", "second"):
                        key = (" ".join(command), model, when)
                        before, began = _cpu_seconds(made), time.perf_counter()
                        subprocess.run(
                            [*command, str(made.mountpoint / model)],
                            stdout=subprocess.DEVNULL, check=True,
                        )  # fmt: skip
                        times.setdefault(key, []).append(time.perf_counter() - began)
                        cpu.setdefault(key, []).append(_cpu_seconds(made) - before)
                        steps.advance()
                    made.stop()
    return [
        {
            "command": command, "directory": model, "time": when, "seconds": median(values),
            "daemon_cpu_s": median(cpu[command, model, when]), "rounds": values,
        }
        for (command, model, when), values in times.items()
    ]  # fmt: skip


def _reads(made: Scratch, rounds: int, total: int) -> list[dict[str, Any]]:
    """Read the large session with one and with four readers, page cache dropped."""
    results = []
    made.start(mount=True)
    files = sorted((made.mountpoint / "large").glob("*/*.kv"))
    for readers in READERS:
        rates, cpu = [], []
        with Steps(f"reading with {readers}", rounds) as steps:
            for _ in range(rounds):
                drop_page_cache()
                before, began = _cpu_seconds(made), time.perf_counter()
                threads = [
                    threading.Thread(target=_read_all, args=(files[number::readers],))
                    for number in range(readers)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                rates.append(total / (time.perf_counter() - began) / GIGABYTE)
                cpu.append((_cpu_seconds(made) - before) / (total / GIGABYTE))
                steps.advance()
        results.append({
            "readers": readers, "GB_s": median(rates), "daemon_cpu_s_per_GB": median(cpu),
            "rounds": rates,
        })  # fmt: skip
    made.stop()
    return results


def _read_all(files: list[Path]) -> None:
    """Read *files* from begin to end, with a buffer that is used again."""
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _cpu_seconds(made: Scratch) -> float:
    """Return the CPU time of the daemon so far."""
    assert made.daemon is not None
    fields = Path(f"/proc/{made.daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
