"""Drives processes that answer (support.answering): one JSON request a line, one JSON answer."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from support.engines import engine_environment

LOG: Final = os.environ.get("TWFS_ENGINE_LOG", os.devnull)  # where the engines' own output goes


class Asked:
    """One process in an engine's environment; also a context manager."""

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        self._log = Path(LOG).open("ab")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=engine_environment(**environment), start_new_session=True,
        )  # fmt: skip
        assert self.answer() == "ready"

    def send(self, **request: Any) -> None:
        """Send a request; `answer` has what comes of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the oldest request without one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine has ended: TWFS_ENGINE_LOG ({LOG}) says why"
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        """Send a request and return its answer."""
        self.send(**request)
        return self.answer()

    def close(self) -> int:
        """End the process and wait for its end; what it ends with."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        self._log.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is not None:  # it may wait for what never comes
            os.killpg(self.process.pid, signal.SIGKILL)
        self.close()


class Generating(Asked):
    """One that is an engine."""

    def generate(self, *prompts: dict[str, Any], out: int = 4, **more: Any) -> dict[str, Any]:
        """Answer *prompts* (see support.vllmengine) in one batch."""
        answer: dict[str, Any] = self.ask(do="generate", prompts=prompts, out=out, **more)
        return answer
