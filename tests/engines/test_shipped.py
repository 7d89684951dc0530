"""Guaranteed: what the engines' own tests find right on a local filesystem is right below /files.

The unmodified tests of vLLM's and LMCache's storage in files, as their sdists ship them, run twice,
pytest's own directories and TMPDIR first on the disk, then on a real mount. Whatever passes on the
disk passes on the mount, but for tests that make links, which docs/files.md says are refused. A
test that fails on the disk says nothing about us: it is told of, and not compared.
"""

import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from support.engines import engine_environment, engine_python
from support.mounting import mounted
from support.warehouses import make_warehouse

ENGINE: Final = "shipped"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(1200)]  # fmt: skip

DEVICE_BYTES: Final = 1 << 30
RUN_S: Final = 500.0
PASSED: Final = ""  # what is said of a test that passed
LINKS_REFUSED: Final = "Operation not permitted"  # docs/files.md, "What does not"


@dataclass(frozen=True)
class Suite:
    """Tests that an engine ships: a folder of its sources, and which files of it run."""

    folder: str
    below: str
    files: tuple[str, ...]
    passed_min: int
    links: frozenset[str]  # the tests that make links
    by_chance: tuple[str, ...] = ()  # left out: they pass or fail by how threads are scheduled

    def run(self, directory: Path, report: Path) -> dict[str, str]:
        """Run all in *directory*; what each test said, by said_in."""
        python = engine_python(ENGINE)
        sources = python.parents[1] / self.folder
        (directory / "tmp").mkdir(parents=True)
        environment = engine_environment(
            TMPDIR=str(directory / "tmp"), PYTHONDONTWRITEBYTECODE="1", LMCACHE_TRACK_USAGE="false",
        )  # fmt: skip
        environment["PYTHONPATH"] = str(sources)  # its package `tests`, not ours
        done = subprocess.run(
            [
                python, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider",
                f"--basetemp={directory / 'base'}", f"--junitxml={report}",
                *(f"--deselect={self.below}/{test}" for test in self.by_chance),
                *(f"{self.below}/{file}" for file in self.files),
            ],
            cwd=sources, env=environment, capture_output=True, text=True, check=False,
            timeout=RUN_S,
        )  # fmt: skip
        assert done.returncode in {0, 1}, done.stdout[-20_000:] + done.stderr[-5_000:]
        return said_in(report)


def said_in(report: Path) -> dict[str, str]:
    """By test that was not skipped: how it failed by pytest's *report*, or PASSED."""
    said: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            wrong = [each for kind in ("failure", "error") for each in case.findall(kind)]
            name = f"{case.get('classname')}::{case.get('name')}"
            said[name] = "\n".join(each.text or "failed" for each in wrong) or PASSED
    return said


VLLM: Final = Suite(
    "vllm", "tests/v1/kv_offload",
    ("tiering/test_fs_tier.py", "test_file_mapper.py", "tiering/test_tiering_offloading.py"),
    passed_min=115,
    links=frozenset(
        f"tests.v1.kv_offload.tiering.test_fs_tier::test_transient_load_failure_leaves_file[{by}]"
        for by in (True, False)
    ),
)  # fmt: skip

LMCACHE: Final = Suite(
    "lmcache", "tests/v1",
    (
        "distributed/test_dax_l2_adapter.py", "distributed/test_devdax_l1_allocator.py",
        "distributed/test_fs_l2_adapter_delete.py", "distributed/test_fs_l2_adapter_keys.py",
        "distributed/test_fs_native_l2_adapter_config.py", "distributed/test_hf3fs_l2_adapter.py",
        "distributed/test_l2_adapter_factory.py", "distributed/test_raw_block_l2_adapter.py",
        "gpu_connector/gds_backends/test_file.py", "internal_api_server/test_load_fs_chunks.py",
        "mp_coordinator/persistence", "mp_observability/trace",
        "storage_backend/test_dax_backend.py", "storage_backend/test_fs_connector.py",
        "storage_backend/test_fs_native_connector.py",
        "storage_backend/test_hf3fs_connector.py", "storage_backend/test_local_disk_backend.py",
        "storage_backend/test_local_disk_put_admission.py", "storage_backend/test_path_sharder.py",
        "storage_backend/test_raw_block_core.py", "storage_backend/test_rust_raw_block_backend.py",
        "test_connector.py::test_fs_connector",
    ),
    passed_min=500,
    links=frozenset({
        "tests.v1.distributed.test_dax_l2_adapter::test_dax_duplicate_config_rejected",
        "tests.v1.distributed.test_dax_l2_adapter::test_dax_hotplug_add_duplicate_device",
        *(
            f"tests.v1.distributed.test_devdax_l1_allocator::{name}"
            for name in (
                "test_add_duplicate_device_rejected[hardlink]",
                "test_add_duplicate_device_rejected[symlink]",
                "test_storage_manager_rejects_l1_add_of_l2_dax_device_alias",
                "test_storage_manager_rejects_l2_add_of_other_l2_device[hotplug]",
                "test_storage_manager_rejects_l2_add_of_other_l2_device[registration]",
            )
        ),
    }),
    by_chance=(
        "storage_backend/test_local_disk_backend.py::TestBatchedGetBlocking"
        "::test_concurrent_reads_use_multiple_threads",
    ),
)  # fmt: skip


@pytest.mark.parametrize("suite", [VLLM, LMCACHE], ids=lambda suite: suite.folder)
def test_what_an_engines_own_tests_find_right_on_a_disk_is_right_on_the_mount(
    suite: Suite, scratch: Path, tmp_path: Path
) -> None:
    on_disk = suite.run(scratch / "disk", tmp_path / "disk.xml")
    right = {name for name, said in on_disk.items() if said == PASSED}
    for name in sorted(on_disk.keys() - right):
        warnings.warn(f"fails on a disk, so not compared: {name}", stacklevel=1)
    make_warehouse(scratch / "w", (DEVICE_BYTES,))
    with mounted(scratch / "w", tmp_path / "mnt") as mount:
        on_mount = suite.run(mount.path / "files/own", tmp_path / "mount.xml")
        figures = mount.statistics()
    assert figures["mount"]["failed_requests"] == 0
    assert figures["counters"]["mount_reads"] > 0
    wrong = {name: on_mount.get(name, "did not run") for name in right}
    wrong = {name: said for name, said in wrong.items() if said != PASSED}
    assert wrong.keys() == suite.links, wrong
    for name, said in wrong.items():
        assert LINKS_REFUSED in said, (name, said)
    assert len(right) - len(wrong) >= suite.passed_min
