"""What holds for every test: required tests are not skipped, and nothing is left behind.

Fixtures: `scratch`, a directory for images and warehouses whose filesystem supports O_DIRECT.
"""

import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

# Every process that a test starts inherits this, so that the ones left over can be told from
# those of another run on the same machine.
SESSION: Final = f"TWFS_TEST_SESSION={uuid.uuid4()}"
SCRATCH_PREFIX: Final = f"twfs-tests-{os.getpid()}-"
REQUIRED: Final = frozenset(filter(None, os.environ.get("TWFS_REQUIRE", "").split(",")))
NOT_ASKED: Final = "runs with ./run test-engines"  # support/engines.py skips so
ENDING_S: Final = 30.0  # how long a process that was told to end may still be seen
HELPERS_OF_PYTHON: Final = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

_slow_machine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=_slow_machine
)
settings.register_profile(
    "explore", deadline=None, max_examples=1000, suppress_health_check=_slow_machine
)
settings.load_profile(os.environ.get("TWFS_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Mark this process's children-to-be."""
    name, _, value = SESSION.partition("=")
    os.environ[name] = value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why."""
    lacking = {
        "root": None if os.geteuid() == 0 else "needs root",
        "fuse": None
        if os.geteuid() == 0 and Path("/dev/fuse").exists()
        else "needs root and /dev/fuse",
    }
    for item in items:
        for name, reason in lacking.items():
            if reason is not None and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a test with a required marker into a failure."""
    report = yield
    marks = sorted(name for name in REQUIRED if item.get_closest_marker(name))
    # Real engines run only where they are asked for, whatever else they need.
    asked = NOT_ASKED not in str(report.longrepr)
    if report.skipped and marks and asked and not hasattr(report, "wasxfail"):
        report.longrepr = _refusal(marks, report.longrepr)
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole module with a required marker into a failure."""
    report = yield
    if report.skipped and isinstance(collector, pytest.Module):
        source = collector.path.read_text()
        marks = sorted(name for name in REQUIRED if f"mark.{name}" in source)
        if marks:
            report.longrepr = _refusal(marks, report.longrepr)
            report.outcome = "failed"
    return report


def _refusal(marks: list[str], skipped: object) -> str:
    """Say why a skip is a failure."""
    why = skipped[2] if isinstance(skipped, tuple) else skipped
    return f"TWFS_REQUIRE demands tests marked {', '.join(marks)}, but this was skipped: {why}"


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the run if mounts, loop devices or processes of its own outlive the tests."""
    yield
    deadline = time.monotonic() + ENDING_S
    while (left := _processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    complaints = [f"process {pid}: {command}" for pid, command in left]
    complaints += _mounts() + _loop_devices()
    for pid, _ in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if complaints:
        pytest.fail("the tests left behind: " + "; ".join(complaints), pytrace=False)


def _processes() -> list[tuple[int, str]]:
    """Processes that a test of this run started and that still run: id and command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if SESSION.encode() in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if command and not any(helper in command for helper in HELPERS_OF_PYTHON):
                    found.append((int(process.name), command))
    return found


def _mounts() -> list[str]:
    """Mounts on a directory of this run."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount on {line.split()[4]}" for line in lines if _is_ours(line.split()[4])]


def _loop_devices() -> list[str]:
    """Loop devices over a file of this run."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if _is_ours(path := backing.read_text().strip()):
                found.append(f"/dev/{backing.parts[3]} over {path}")
    return found


def _is_ours(path: str) -> bool:
    """Tell whether *path* is in a scratch directory or a tmp_path of this run."""
    return SCRATCH_PREFIX in path or any(path.startswith(str(base)) for base in _TMP_PATHS)


_TMP_PATHS: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def _remember_tmp_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the check at the end know where tmp_path lies."""
    _TMP_PATHS.append(tmp_path_factory.getbasetemp())


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory that supports O_DIRECT; TWFS_TEST_DIR says where, if not in /tmp."""
    directory = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=_direct_io_directory()))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _direct_io_directory() -> Path:
    """Return the first directory of ours in which a file can be opened with O_DIRECT."""
    named = os.environ.get("TWFS_TEST_DIR")
    places = [Path(named)] if named else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for place in places:
        probe = place / f"{SCRATCH_PREFIX}probe"
        try:
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
        except OSError:
            continue
        finally:
            probe.unlink(missing_ok=True)
        return place
    pytest.fail(
        f"no O_DIRECT in {', '.join(map(str, places))}: name an ext4 directory in TWFS_TEST_DIR"
    )
