"""Mooncake's store with its SSD offload in a directory, in Mooncake's own environment.

COMMAND DIRECTORY MASTER_PORT KEYS: `put` stores keys of known bytes until all are on the SSD and
says how many. `get` is another client, after a restart: for each line of stdin it reads all keys
and says how many came back right, and how many wrong.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from mooncake.store import MooncakeDistributedStore

VALUE_BYTES: Final = 1 << 20
PATIENCE_S: Final = 240.0  # it offloads at heartbeats, a bucket or so at each


def content(number: int) -> bytes:
    """The bytes of key *number*."""
    return bytes((7 * number + at) % 251 for at in range(4096)) * (VALUE_BYTES // 4096)


def opened(directory: str, port: str) -> Any:
    """A store that is a client of the master, with its SSD in *directory*."""
    store = MooncakeDistributedStore()
    code = store.setup(
        {
            "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE",
            "global_segment_size": str(128 << 20), "local_buffer_size": str(64 << 20),
            "protocol": "tcp", "rdma_devices": "", "master_server_addr": f"127.0.0.1:{port}",
            "enable_ssd_offload": "true", "ssd_offload_path": directory,
        }
    )  # fmt: skip
    assert code == 0, code
    return store


def stored_bytes(directory: Path) -> int:
    """Bytes of all files below *directory*."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def say(*words: int) -> None:
    """Answer whoever started this."""
    sys.stdout.write(f"answer: {' '.join(map(str, words))}\n")
    sys.stdout.flush()


def main() -> None:
    """See the module's docstring."""
    command, directory, port, keys = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    store = opened(directory, port)
    late = time.monotonic() + PATIENCE_S
    if command == "put":
        for number in range(keys):
            assert store.put(f"key-{number}", content(number)) == 0
        while stored_bytes(Path(directory)) < keys * VALUE_BYTES and time.monotonic() < late:
            time.sleep(0.5)
        say(stored_bytes(Path(directory)) // VALUE_BYTES)
    else:
        while store.is_exist(f"key-{keys - 1}") != 1 and time.monotonic() < late:
            time.sleep(0.5)
        for _ in sys.stdin:
            found = [store.get(f"key-{number}") for number in range(keys)]
            right = sum(value == content(number) for number, value in enumerate(found))
            wrong = sum(bool(value) and value != content(n) for n, value in enumerate(found))
            say(right, wrong)
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
