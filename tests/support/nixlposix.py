"""NIXL's POSIX plug-in between memory and files, in its environment: COMMAND DIRECTORY PARAMS.

`write` makes files of bytes that their number gives, `read` compares. Prints how many were right.
"""

import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from nixl._api import nixl_agent, nixl_agent_config

FILES: Final = 16
FILE_BYTES: Final = 1 << 20


def content(number: int) -> bytes:
    """The bytes of file *number*."""
    return bytes((number + at) % 251 for at in range(4096)) * (FILE_BYTES // 4096)


def transfer(agent: Any, operation: str, memory: mmap.mmap, address: int, fds: list[int]) -> None:
    """Move all pieces of *memory* to the files, or back, in one request."""
    held = agent.register_memory([(address, len(memory), 0, "")], "DRAM")
    files = agent.register_memory([(0, FILE_BYTES, fd, "") for fd in fds], "FILE")
    here = agent.get_xfer_descs(
        [(address + at * FILE_BYTES, FILE_BYTES, 0) for at in range(len(fds))], "DRAM"
    )
    there = agent.get_xfer_descs([(0, FILE_BYTES, fd) for fd in fds], "FILE")
    handle = agent.initialize_xfer(operation, here, there, "tester")
    state = agent.transfer(handle)
    while state not in {"DONE", "ERR"}:
        time.sleep(0.001)
        state = agent.check_xfer_state(handle)
    assert state == "DONE", state
    agent.release_xfer_handle(handle)
    agent.deregister_memory(files)
    agent.deregister_memory(held)


def main() -> None:
    """See the module's docstring."""
    command, directory, params = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    import numpy as np

    agent = nixl_agent("tester", nixl_agent_config(backends=[]))
    agent.create_backend("POSIX", params)
    memory = mmap.mmap(-1, FILES * FILE_BYTES)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    flags = os.O_RDWR | os.O_CREAT if command == "write" else os.O_RDONLY
    fds = [os.open(directory / f"obj_{n}.bin", flags | os.O_DIRECT, 0o600) for n in range(FILES)]
    if command == "write":
        for number in range(FILES):
            memory[number * FILE_BYTES : (number + 1) * FILE_BYTES] = content(number)
    transfer(agent, command.upper(), memory, address, fds)
    for fd in fds:
        os.close(fd)
    right = sum(
        memory[number * FILE_BYTES : (number + 1) * FILE_BYTES] == content(number)
        for number in range(FILES)
    )
    sys.stdout.write(f"{right}\n")


if __name__ == "__main__":
    main()
