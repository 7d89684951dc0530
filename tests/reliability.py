"""Writes RELIABILITY.md from faults.toml, the tests that are there, and the reports of long runs.

python tests/reliability.py            # writes it; tests/test_reliability.py compares
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "tests" / "crash" / "results"
FIGURES: Final = ROOT / "tests" / "bench" / "results"
DOCUMENT: Final = ROOT / "RELIABILITY.md"
CASE: Final = re.compile(r"^(tests/\S+?\.py)::(\w+)")
HEAD: Final = """# Reliability

What can go wrong, what twfs promises then, and how often that was tried. Written by
`python tests/reliability.py` from `tests/faults.toml`, the tests and the reports of long runs in
`tests/crash/results/`; a test holds it to them. The number of cases is what `./run test` runs each
time; the commands of long runs are below `tests/crash/`.

| fault | promise | how injected | times tried | result |
| --- | --- | --- | --- | --- |
"""
TESTS: Final = """
## The tests of each row

"""
COST: Final = """
## What looking for damage takes

`twfs bench check` on 2 cores and a virtio disk (`tests/bench/results/`), beside dd (16 MiB, direct)
and fio (4 in flight) that read all of the device. Seconds; in parentheses CPU seconds and memory.

| warehouse | check | check --data | rebuild, with a check | dd | fio |
| --- | --- | --- | --- | --- | --- |
"""


def cases() -> Counter[str]:
    """How many cases each test function has, as pytest collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    matches = map(CASE.match, shown.splitlines())
    return Counter(found[2] for found in matches if found is not None)


def at(report: Any, place: str) -> Any:
    """What a report has at a dotted *place*."""
    for name in place.split("."):
        report = report[name]
    return report


def times(wanted: str, there: Counter[str]) -> int:
    """How many cases a test function, or those of a pattern, have; KeyError where that is none."""
    found = sum(there[name] for name in there if fnmatchcase(name, wanted))
    if not found:
        raise KeyError(f"no test {wanted}")
    return found


def row_of(row: dict[str, Any], there: Counter[str]) -> str:
    """One line of the table; KeyError: a test is not there; ValueError: a run found something."""
    tried = []
    count = sum(times(name, there) for name in row["tests"])
    if count:
        tried.append("1 case" if count == 1 else f"{count} cases")
    result = "each run passes"
    if "run" in row:
        run = row["run"]
        report = json.loads((RESULTS / run["file"]).read_text())
        if any(at(report, place) for place in run["none"]):
            raise ValueError(f"{run['file']} has findings: {run['none']}")
        number = sum(int(at(report, place)) for place in run["tried"])
        tried.append(f"{number:,} in one run of `{run['command']}`")
        names = ", ".join(place.replace("_", " ") for place in run["none"])
        result = f"0 {names}" + ("; each run passes" if count else "")
    told = [row["fault"], row["promise"], row["injected"], "; ".join(tried), result]
    return "| " + " | ".join(told) + " |\n"


def costs() -> str:
    """The lines of the last table, from the newest results of `twfs bench check`."""
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for path in sorted(FIGURES.glob("*-check-*.json")):
        for each in json.loads(path.read_text())["results"]:
            told = f"{each['seconds']:.1f}"
            if "cpu_seconds" in each:
                told += f" ({each['cpu_seconds']:.0f}, {each['memory_MiB']:.0f} MiB)"
            rows.setdefault((each["blocks"], each["block_bytes"]), {})[each["of"]] = told
    text = ""
    for (blocks, size), cell in rows.items():
        named = f"{blocks:,} blocks of {size >> 10} KiB"
        cells = [named, *(cell[of] for of in ("check", "check --data", "rebuild", "dd", "fio"))]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def document() -> str:
    """The whole of RELIABILITY.md."""
    rows = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())["fault"]
    there = cases()
    text = HEAD + "".join(row_of(row, there) for row in rows) + COST + costs() + TESTS
    for row in rows:
        names = ", ".join(f"`{name}`" for name in row["tests"]) or "outside the suite"
        text += f"* **{row['fault']}**: {names}.\n"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document())
