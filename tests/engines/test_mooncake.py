"""Mooncake's store, unmodified, with its SSD offload below /files.

All keys are there after a restart. Those of a file that is lost are misses, and no others: Mooncake
checks no bytes itself, so that the mount's EIO is what keeps wrong ones from it.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.asking import Asked
from support.engines import engine_python, free_port
from support.faultydisks import needs_faults
from support.filefaults import faulty_files
from support.mounting import mounted
from support.snippets import settings_of
from support.warehouses import make_warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(400)]  # fmt: skip

KEYS: Final = 24  # of 1 MiB, three buckets
DEVICE_BYTES: Final = 512 << 20  # Mooncake wants 256 MiB free beside what it stores, or it evicts
SETTING, *DESCRIPTORS = settings_of("files.md", "Mooncake")
BACKENDS: Final = [each.partition("=")[2] for each in DESCRIPTORS]


@contextmanager
def master() -> Iterator[int]:
    """Mooncake's master; its port."""
    port = free_port()
    command = [
        str(engine_python("mooncake").with_name("mooncake_master")),
        "--enable_offload=true", "--rpc_port",
        str(port), "--metrics_port", str(free_port()),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield port
        finally:
            process.terminate()


@contextmanager
def offload(directory: Path, backend: str) -> Iterator[Asked]:
    """A client of a fresh master, see support.mooncakes; it must end well."""
    with master() as port:
        (descriptor,) = [each for each in DESCRIPTORS if each.endswith(f"={backend}")]
        name, _, value = descriptor.partition("=")
        setting = f"{{{SETTING}}}".replace("/tw/files/cache", str(directory))
        with Asked(
            [
                engine_python("mooncake"),
                "-m",
                "support.mooncakes",
                directory,
                str(port),
                str(KEYS),
                setting,
            ],
            MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS="1",
            MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES=str(8 << 20),
            **{name: value},
        ) as client:
            yield client
        assert client.process.returncode == 0


def put_all(directory: Path, backend: str) -> None:
    """Store all keys below *directory*."""
    with offload(directory, backend) as client:
        assert client.ask(do="put") == KEYS


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_are_there_after_a_restart(backend: str, scratch: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mnt/files/kv"
    make_warehouse(scratch, (DEVICE_BYTES,))
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        put_all(directory, backend)
    with mounted(scratch, tmp_path / "mnt") as mount:
        with offload(directory, backend) as client:
            assert client.ask(do="find")
            assert client.ask(do="get") == [KEYS, 0]
        assert mount.statistics()["counters"]["mount_reads"] >= 3


@needs_faults
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_lost_is_a_miss_and_nothing_else_is(backend: str, scratch: Path) -> None:
    with faulty_files(scratch, DEVICE_BYTES) as files:
        put_all(files.directory, backend)
        large = sorted(
            path for path in files.directory.rglob("*")
            if path.is_file() and path.stat().st_size >= 1 << 20
        )  # fmt: skip
        lost = sum(path.stat().st_size for path in large[:2]) >> 20  # a key each, or a bucket
        with offload(files.directory, backend) as client:
            files.rot(large[0])
            with files.unreadable(large[1]):
                assert client.ask(do="find")
                right, wrong = client.ask(do="get")
            assert wrong == 0
            assert KEYS - lost <= right <= KEYS - 2  # a file goes once its bad block is met
            files.gone(large[0])
            files.gone(large[1])
            assert client.ask(do="get") == [KEYS - lost, 0]
            files.mount.kill()
            assert client.ask(do="get") == [0, 0]
            files.mount.start()
            assert client.ask(do="get") == [KEYS - lost, 0]
