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
TAIL: Final = """
## The tests of each row

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


def document() -> str:
    """The whole of RELIABILITY.md."""
    rows = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())["fault"]
    there = cases()
    text = HEAD + "".join(row_of(row, there) for row in rows) + TAIL
    for row in rows:
        names = ", ".join(f"`{name}`" for name in row["tests"]) or "outside the suite"
        text += f"* **{row['fault']}**: {names}.\n"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document())
