"""`twfs bench check`: what `check`, `check --data` and `rebuild` take, beside dd and fio.

A warehouse of the smallest blocks shows what a block costs, one of 2 MiB blocks what a byte costs.
dd and fio read the whole device, as a rebuild does. Ours run as processes, as an operator
runs them, and with a cold page cache; the metadata is read from the disk too.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.errors import DeviceError
from twfs_tools.bench import fio
from twfs_tools.bench.report import (
    GIGABYTE,
    DirectoryOption,
    QuickFlag,
    RoundsOption,
    finish,
    interleave,
    median,
)
from twfs_tools.bench.scratch import (
    Scratch,
    forget,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.output import JsonFlag, Steps, parse_size

SMALL_BYTES: Final = 4096  # of payload: with its header 8 KiB of the device
LARGE_BYTES: Final = 2 << 20
HEADER_BYTES: Final = 4096
SESSION_BLOCKS: Final = 1920  # in one chain and one put
PUT_BYTES: Final = 256 << 20  # of one put: its payloads are in memory
READ_BYTES: Final = 16 << 20  # of one request of dd and fio
SAMPLE_S: Final = 0.02  # between two looks at a process
TOOLS: Final[dict[str, tuple[str, ...]]] = {
    "check": ("check",),
    "check --data": ("check", "--data"),
    "rebuild": ("rebuild", "--force"),
}


def check(
    directory: DirectoryOption = Path("/var/tmp"),
    blocks: Annotated[
        int, typer.Option("--blocks", min=0, help="Of 4 KiB, in the first warehouse; 0: none.")
    ] = 1_000_000,
    wanted: Annotated[
        str, typer.Option("--bytes", help="Of 2 MiB blocks, in the second warehouse; 0: none.")
    ] = "8G",
    rounds: RoundsOption = 3,
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Check and rebuild 1,000,000 small blocks, and 8 GiB of large ones, beside dd and fio."""
    large = (8 << 20 if quick else parse_size(wanted)) // LARGE_BYTES
    blocks, rounds = (64, 1) if quick else (blocks, rounds)
    results: list[dict[str, Any]] = []
    for block_bytes, count in ((SMALL_BYTES, blocks), (LARGE_BYTES, large)):
        if count == 0:
            continue
        with scratch(directory, count * (block_bytes + HEADER_BYTES)) as made:
            _fill(made, block_bytes, count)
            results += _one_warehouse(made, block_bytes, count, rounds)
    settings = {"rounds": rounds, "read_bytes": READ_BYTES, "page_cache": "dropped before each"}
    finish("check", directory, settings, results, as_json=as_json)


def _fill(made: Scratch, block_bytes: int, count: int) -> None:
    """Store *count* blocks through the real put, in sessions of SESSION_BLOCKS."""
    together = min(SESSION_BLOCKS, count, max(1, PUT_BYTES // block_bytes))
    payloads = random_payloads(together, block_bytes)
    store = made.open_in_process()
    try:
        model = store.open_model("checked", opaque_layout(block_bytes))
        with Steps(f"storing blocks of {block_bytes} bytes", count) as steps:
            for at in range(0, count, SESSION_BLOCKS):
                names = random_names(model, min(SESSION_BLOCKS, count - at), seed=at + 1)
                for begin in range(0, len(names), together):
                    part = names.slice(begin, min(len(names), begin + together))
                    require_stored(store.put(model, part, payloads[: len(part)]))
                    steps.advance(len(part))
    finally:
        store.close()


def _one_warehouse(
    made: Scratch, block_bytes: int, count: int, rounds: int
) -> list[dict[str, Any]]:
    """Time every case on one warehouse, in turn; a row per case."""
    size_bytes = made.device.stat().st_size
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(_tool, made, words, count) for name, words in TOOLS.items()
    }
    cases["dd"] = partial(_dd, made.device)
    cases["fio"] = partial(_fio, made.device, size_bytes)
    runs = interleave(rounds, cases, f"checking and rebuilding {count} blocks")
    seconds = {name: median([each["seconds"] for each in of_one]) for name, of_one in runs.items()}
    rows: list[dict[str, Any]] = []
    for name, of_one in runs.items():
        row = {
            "of": name, "block_bytes": block_bytes, "blocks": count,
            "device_GB": size_bytes / GIGABYTE, "seconds": seconds[name],
        }  # fmt: skip
        if name in TOOLS:
            row["times_dd"] = seconds[name] / seconds["dd"]
            row["times_fio"] = seconds[name] / seconds["fio"]
            row["cpu_seconds"] = median([each["cpu_seconds"] for each in of_one])
            row["memory_MiB"] = max(each["memory_MiB"] for each in of_one)
        rows.append({**row, "rounds": of_one})
    return rows


def _tool(made: Scratch, words: Sequence[str], count: int) -> dict[str, Any]:
    """Run one of our tools; it must find every block, and nothing wrong."""
    forget(made.directory)
    command = [sys.executable, "-m", "twfs_tools.cli", *words, str(made.directory), "--json"]
    done, output = _timed(command)
    document = json.loads(output)
    rebuilt = document.get("rebuilt", {})
    checked = document["check"] if rebuilt else document["report"]
    if not document["ok"] or checked["blocks"] != count:
        raise DeviceError(
            f"`twfs {words[0]}` found {checked['blocks']:,} of {count:,} blocks and "
            f"{len(checked['findings']):,} faults in a warehouse just filled"
        )
    if rebuilt:
        shutil.rmtree(rebuilt["old"])
        done["phases"] = {**rebuilt["seconds"], "checking": checked["seconds"]}
    return done


def _dd(device: Path) -> dict[str, Any]:
    """Read all of *device* with dd, past the page cache."""
    command = ["dd", f"if={device}", "of=/dev/null", f"bs={READ_BYTES}", "iflag=direct"]
    return _timed([*command, "status=none"])[0]


def _fio(device: Path, size_bytes: int) -> dict[str, Any]:
    """Read all of *device* with fio, several requests in flight; what is less than one is not."""
    run = fio.Run(device, 0, READ_BYTES, size_bytes // READ_BYTES)
    return {"seconds": fio.seconds(run)}


def _timed(command: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Run *command*; its time, CPU time and peak of memory, and what it printed.

    The peak is asked for while it runs: what wait4 says of it begins with the memory of this
    process, from which the other one was forked.
    """
    peak_kib = 0
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak_kib = max(peak_kib, _peak_kib(process.pid))
            time.sleep(SAMPLE_S)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode != 0:
        raise DeviceError(f"`{' '.join(command)}` ended with {process.returncode}")
    return {
        "seconds": took,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_MiB": peak_kib / 1024,
    }, printed


def _peak_kib(pid: int) -> int:
    """The most memory that process *pid* has had resident so far; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
