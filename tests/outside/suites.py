"""Outside suites on a real mount: `python tests/outside/suites.py RESULTS [options]`.

Runs stress-ng's filesystem stressors, and pjdfstest if `--pjdfstest` names its source folder (built
there by hand: `autoreconf -ifs && ./configure && make pjdfstest`), in a model's directory of a
mounted warehouse. They were written for filesystems where anybody may create files: most of what
they try is refused here, as it must be. So what counts is that the daemon serves on, that nothing
is stored or lost, and which groups pass. RESULTS gets it all as JSON; README.md says what it means.
Needs root; `--pjdfstest` needs perl.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
SOURCES: Final = [str(REPOSITORY / part) for part in ("", "tests", "mount", "tools")]
sys.path[:0] = SOURCES

from support.mounting import Mount, mounted, store  # noqa: E402
from support.warehouses import MHA, SHARDED  # noqa: E402
from twfs_tools.target import find_mount  # noqa: E402

STRESS_SECONDS: Final = 1
GROUP_SECONDS_MAX: Final = 600.0


def stress_names() -> list[str]:
    """The stressors of stress-ng's class filesystem."""
    said = subprocess.run(
        ["stress-ng", "--class", "filesystem?"], capture_output=True, text=True, check=False
    )
    return (said.stdout + said.stderr).partition("stressors:")[2].split()


def run_stress(folder: Path, names: list[str]) -> dict[str, Any]:
    """Each stressor for a second, alone, with --verify, in *folder*; how it ended."""
    found: dict[str, Any] = {}
    for name in names:
        command = [
            "stress-ng", f"--{name}", "2", "--timeout", f"{STRESS_SECONDS}s", "--verify",
            "--temp-path", str(folder), "--metrics-brief",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=GROUP_SECONDS_MAX
            )
        except subprocess.TimeoutExpired:
            found[name] = {"exit": None, "said": "did not end"}
            continue
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "fail" in line]
        found[name] = {"exit": done.returncode, "said": plain(lines[0]) if lines else ""}
    return found


def plain(line: str) -> str:
    """A line of stress-ng without its prefix, numbers of processes and temporary names."""
    line = re.sub(r"^stress-ng: \w+:\s+\[\d+\]\s*", "", line)
    return re.sub(r"\d{3,}", "N", re.sub(r"/\S*/", "", line))[:120]


def run_pjdfstest(source: Path, folder: Path) -> dict[str, Any]:
    """Every group of pjdfstest, in *folder*; tests and failures by group."""
    found: dict[str, Any] = {}
    for group in sorted(path for path in (source / "tests").iterdir() if path.is_dir()):
        try:
            done = subprocess.run(
                ["prove", "-r", str(group)], cwd=folder, capture_output=True, text=True,
                check=False, timeout=GROUP_SECONDS_MAX,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found[group.name] = {"said": "did not end"}
            continue
        failed = sum(int(n) for n in re.findall(r"Failed (\d+)/\d+ subtests", done.stdout))
        tests = re.search(r"Tests=(\d+)", done.stdout)
        found[group.name] = {"tests": int(tests[1]) if tests else 0, "failed": failed}
    return found


def serves_on(mount: Mount, before: dict[str, Any]) -> bool:
    """Whether the mount answers, had no request that met a bug, and holds the blocks it held."""
    figures = mount.statistics()
    return (
        find_mount(mount.path) is not None
        and figures["mount"]["failed_requests"] == 0
        and figures["metadata"]["readers"] <= before["metadata"]["readers"] + 1
        and figures["records"]["blocks"] == before["records"]["blocks"]
    )


def main() -> int:
    """Run what was asked for, and write the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--pjdfstest", type=Path)
    parser.add_argument("--scratch", type=Path, help="a filesystem with O_DIRECT")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="twfs-outside-") as name:
        scratch = Path(name)
        (scratch / "w").mkdir()
        with mounted(scratch / "w", scratch / "mount") as mount:
            store(mount, "plain", MHA, 6)
            store(mount, "sharded", SHARDED, 4)
            before = mount.statistics()
            folder = mount.path / "plain"
            results: dict[str, Any] = {
                "date": time.strftime("%Y-%m-%d"), "kernel": platform.release(),
                "stress-ng": run_stress(folder, stress_names()),
            }  # fmt: skip
            if given.pjdfstest is not None:
                results["pjdfstest"] = run_pjdfstest(given.pjdfstest.resolve(), folder)
            results["served on, nothing stored or lost"] = serves_on(mount, before)
    given.results.write_text(json.dumps(results, indent=1) + "\n")
    return not results["served on, nothing stored or lost"]


if __name__ == "__main__":
    sys.exit(main())
