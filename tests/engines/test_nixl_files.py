"""NIXL's POSIX plug-in, unmodified, with files below /files, each way it can do its I/O."""

import json
import subprocess
from pathlib import Path

import pytest

from support.engines import engine_environment, engine_python
from support.mounting import mounted

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(300)]  # fmt: skip

FILES = 16


def moved(command: str, directory: Path, params: dict[str, str]) -> int:
    """Files that came out right."""
    done = subprocess.run(
        [engine_python("nixl"), "-m", "support.nixlposix", command, directory, json.dumps(params)],
        env=engine_environment(), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("how", ["libaio", "use_uring", "use_posix_aio"])
def test_files_are_written_and_read_after_a_restart(
    how: str, scratch: Path, tmp_path: Path
) -> None:
    params = {} if how == "libaio" else {how: "true"}
    directory = tmp_path / "mnt/files/kv"
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        assert moved("write", directory, params) == FILES
    with mounted(scratch, tmp_path / "mnt") as mount:
        assert moved("read", directory, params) == FILES
        assert mount.statistics()["counters"]["mount_reads"] >= FILES
