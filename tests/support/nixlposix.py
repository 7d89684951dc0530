"""NIXL's POSIX plug-in between memory and files, in its environment: DIRECTORY BACKEND PARAMS.

Requests: `write` makes files of bytes that their number gives, `read` compares: both in one request
of NIXL's, and the answer is how many files were right. `open` opens all anew to be read; `together`
reads them in one request and tells its state; `each` reads one by one (Answer).
"""

import json
import mmap
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config, nixlBind

from support.answering import Answers

FILES: Final = 16
FILE_BYTES: Final = 1 << 20
NIXL_ERROR: Final[type[Exception]] = nixlBind.nixlBackendError


class Answer(TypedDict):
    """Which files were "DONE", and which of these are right."""

    done: list[int]
    right: list[int]


def content(number: int) -> bytes:
    """The bytes of file *number*."""
    return bytes((number + at) % 251 for at in range(4096)) * (FILE_BYTES // 4096)


class Mover:
    """An agent, and memory for all files."""

    def __init__(self, directory: Path, backend: str, params: dict[str, str]) -> None:
        self.directory = directory
        self.agent: Any = nixl_agent("tester", nixl_agent_config(backends=[]))
        self.agent.create_backend(backend, params)
        self.memory = mmap.mmap(-1, FILES * FILE_BYTES)
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.fds: list[int] = []

    def open(self, flags: int) -> None:
        """Open all files; those that were open are closed."""
        for fd in self.fds:
            with suppress(OSError):  # of a mount that has died
                os.close(fd)
        self.fds = [
            os.open(self.directory / f"obj_{number}.bin", flags | os.O_DIRECT, 0o600)
            for number in range(FILES)
        ]

    def put(self, number: int, data: bytes) -> None:
        """Fill the memory of file *number*."""
        self.memory[number * FILE_BYTES : (number + 1) * FILE_BYTES] = data

    def is_right(self, number: int) -> bool:
        """Tell whether the memory of file *number* has its bytes."""
        return self.memory[number * FILE_BYTES : (number + 1) * FILE_BYTES] == content(number)

    def transfer(self, operation: str, numbers: range) -> str:
        """Move the pieces of memory of these files to them, or back, in one request; its state."""
        agent = self.agent
        held = agent.register_memory([(self.address, len(self.memory), 0, "")], "DRAM")
        files = agent.register_memory([(0, FILE_BYTES, self.fds[n], "") for n in numbers], "FILE")
        here = agent.get_xfer_descs(
            [(self.address + number * FILE_BYTES, FILE_BYTES, 0) for number in numbers], "DRAM"
        )
        there = agent.get_xfer_descs([(0, FILE_BYTES, self.fds[n]) for n in numbers], "FILE")
        handle = agent.initialize_xfer(operation, here, there, "tester")
        try:
            state: str = agent.transfer(handle)
            while state not in {"DONE", "ERR"}:
                time.sleep(0.001)
                state = agent.check_xfer_state(handle)
        except NIXL_ERROR:  # which it raises rather than say "ERR"
            state = "ERR"
        agent.release_xfer_handle(handle)
        agent.deregister_memory(files)
        agent.deregister_memory(held)
        return state

    def each(self) -> Answer:
        """Read all files in a request each."""
        done = []
        for number in range(FILES):
            self.put(number, bytes(FILE_BYTES))
            if self.transfer("READ", range(number, number + 1)) == "DONE":
                done.append(number)
        return {"done": done, "right": [number for number in done if self.is_right(number)]}

    def all(self, operation: str, flags: int) -> int:
        """Move all files in one request, which must go well; how many are right."""
        self.open(flags)
        state = self.transfer(operation, range(FILES))
        assert state == "DONE", state
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        return sum(map(self.is_right, range(FILES)))

    def answer(self, request: str) -> Any:
        """Do what *request* asks."""
        match request:
            case "write":
                for number in range(FILES):
                    self.put(number, content(number))
                return self.all("WRITE", os.O_RDWR | os.O_CREAT)
            case "read":
                return self.all("READ", os.O_RDONLY)
            case "open":
                return self.open(os.O_RDONLY)
            case "together":
                return self.transfer("READ", range(FILES))
            case "each":
                return self.each()
            case _:
                raise ValueError(request)


def main() -> None:
    """See the module's docstring."""
    answers = Answers()
    mover = Mover(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    for request in answers.requests():
        answers.say(mover.answer(request["do"]))


if __name__ == "__main__":
    main()
