"""Mooncake's store with its SSD offload in a directory, in Mooncake's own environment.

DIRECTORY MASTER_PORT KEYS SETTING, which is JSON and names the directory to Mooncake. Requests:
`put` stores keys of known bytes until all are on the SSD, and answers how many are. `find`, to
another client after a restart, waits until the last one is found. `get` reads all and answers how
many came back right, and how many wrong. At the first one the store opens, and reads of what is
there: a test may do its damage before that.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mooncake.store import MooncakeDistributedStore

from support.answering import Answers

VALUE_BYTES: Final = 1 << 20
PATIENCE_S: Final = 240.0  # it offloads at heartbeats, a bucket or so at each


def content(number: int) -> bytes:
    """The bytes of key *number*."""
    return bytes((7 * number + at) % 251 for at in range(4096)) * (VALUE_BYTES // 4096)


def opened(port: str, setting: dict[str, str]) -> Any:
    """A store that is a client of the master, with its SSD where *setting* says."""
    store = MooncakeDistributedStore()
    code = store.setup(
        {
            "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE",
            "global_segment_size": str(128 << 20), "local_buffer_size": str(64 << 20),
            "protocol": "tcp", "rdma_devices": "", "master_server_addr": f"127.0.0.1:{port}",
            "enable_ssd_offload": "true", **setting,
        }
    )  # fmt: skip
    assert code == 0, code
    return store


def stored_bytes(directory: Path) -> int:
    """Bytes of all files below *directory*."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def wait(done: Callable[[], bool]) -> bool:
    """Tell whether it is done in time."""
    late = time.monotonic() + PATIENCE_S
    while not done() and time.monotonic() < late:
        time.sleep(0.5)
    return done()


def answer(store: Any, directory: Path, keys: int, request: str) -> Any:
    """Do what *request* asks."""
    match request:
        case "put":
            for number in range(keys):
                assert store.put(f"key-{number}", content(number)) == 0
            wait(lambda: stored_bytes(directory) >= keys * VALUE_BYTES)
            return stored_bytes(directory) // VALUE_BYTES
        case "find":
            return wait(lambda: store.is_exist(f"key-{keys - 1}") == 1)
        case "get":
            found = [store.get(f"key-{number}") for number in range(keys)]
            right = sum(value == content(number) for number, value in enumerate(found))
            return right, sum(map(bool, found)) - right
        case _:
            raise ValueError(request)


def main() -> None:
    """See the module's docstring."""
    answers = Answers()
    directory, port, keys = sys.argv[1], sys.argv[2], int(sys.argv[3])
    setting = json.loads(sys.argv[4])
    store = None
    for request in answers.requests():
        store = store or opened(port, setting)
        answers.say(answer(store, Path(directory), keys, request["do"]))
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
