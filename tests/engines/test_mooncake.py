"""Mooncake's store, unmodified, with its SSD offload below /files: all keys after a restart."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.engines import ENGINES, engine_environment, engine_python
from support.filing import free_port
from support.mounting import mounted
from support.warehouses import make_warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(400)]  # fmt: skip

KEYS: Final = 24  # of 1 MiB, three buckets
DEVICE_BYTES: Final = 512 << 20  # Mooncake wants 256 MiB free beside what it stores, or it evicts


@contextmanager
def master() -> Iterator[int]:
    """Mooncake's master; its port."""
    port = free_port()
    command = [
        str(ENGINES / "mooncake/bin/mooncake_master"), "--enable_offload=true", "--rpc_port",
        str(port), "--metrics_port", str(free_port()),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield port
        finally:
            process.terminate()


def offload(command: str, directory: Path, backend: str) -> list[int]:
    """Run a client of a fresh master; what it prints."""
    python = engine_python("mooncake")
    with master() as port:
        done = subprocess.run(
            [python, "-m", "support.mooncakes", command, directory, str(port), str(KEYS)],
            env=engine_environment(
                MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR=backend,
                MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS="1",
                MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES=str(8 << 20),
            ),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


@pytest.mark.parametrize("backend", ["bucket_storage_backend", "file_per_key_storage_backend"])
def test_all_keys_are_there_after_a_restart(backend: str, scratch: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mnt/files/kv"
    make_warehouse(scratch, (DEVICE_BYTES,))
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        assert offload("put", directory, backend) == [KEYS]
    with mounted(scratch, tmp_path / "mnt") as mount:
        assert offload("get", directory, backend) == [KEYS, 0]
        assert mount.statistics()["counters"]["mount_reads"] >= 3
