"""What every benchmark reports: the machine, the settings, medians of interleaved rounds.

One thread.
"""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from twfs_tools.output import Steps, print_json, print_table, say

DirectoryOption = Annotated[
    Path, typer.Option("--directory", help="Where the scratch goes: on the disk to measure.")
]
DeviceOption = Annotated[
    Path | None,
    typer.Option("--device", help="An empty block device to use; it is overwritten and wiped."),
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Rounds; medians are shown.")]
QuickFlag = Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that it runs.")]
Result = TypeVar("Result")
GIGABYTE = 1e9  # rates are in decimal GB/s, as fio and vendors give them


def environment(directory: Path) -> dict[str, Any]:
    """Say what was measured on: processor, memory, disk, kernel, versions, date."""
    processors = [
        line.partition(":")[2].strip()
        for line in _text(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    ]
    memory = [line for line in _text(Path("/proc/meminfo")).splitlines() if "MemTotal" in line]
    huge = Path("/sys/kernel/mm/transparent_hugepage")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": processors[0] if processors else "unknown",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_kib": int(memory[0].split()[1]) if memory else None,
        "disk": _output("findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "-T", str(directory)),
        "transparent_hugepage": _text(huge / "enabled").strip(),
        "shmem_enabled": _text(huge / "shmem_enabled").strip(),
        "python": platform.python_version(),
        "fio": _output("fio", "--version"),
    }


def _text(path: Path) -> str:
    """Return the text of *path*, or nothing."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Return what *command* prints, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def interleave(
    rounds: int, cases: Mapping[str, Callable[[], Result]], text: str
) -> dict[str, list[Result]]:
    """Run every case once per round, in turn, the first one first in even rounds; all results."""
    results: dict[str, list[Result]] = {name: [] for name in cases}
    names = list(cases)
    with Steps(text, rounds * len(cases)) as steps:
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                results[name].append(cases[name]())
                steps.advance()
    return results


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that *percent* of *values* do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def finish(
    name: str,
    directory: Path,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
) -> None:
    """Print the results: one JSON document, or a table per kind of result."""
    if as_json:
        print_json({
            "bench": name, "environment": environment(directory), "settings": dict(settings),
            "results": [dict(each) for each in results],
        })  # fmt: skip
        return
    shapes: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for each in results:
        shapes.setdefault(tuple(key for key in each if key != "rounds"), []).append(each)
    for columns, rows in shapes.items():
        cells = [[_cell(row[key]) for key in columns] for row in rows]
        print_table([f">{key}" for key in columns], cells)
        say("")


def _cell(value: object) -> str:
    """Show a number with as many digits as mean something."""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)
