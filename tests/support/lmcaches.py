"""Drives real `lmcache server` processes whose L2 is a warehouse, as docs/lmcache.md says to.

The page's command and configurations are what is run, with sockets, ports and sizes of the test's.
"""

import json
import shlex
import subprocess
import urllib.request
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, Self

from support.asking import LOG
from support.daemon import Daemon
from support.engines import engine_environment, engine_python, free_port, until
from support.snippets import run_lines, snippets_of

L1_GB: Final = 0.25


def page_json(number: int, **replaced: str) -> dict[str, Any]:
    """A configuration of the page, with texts replaced."""
    text = snippets_of("lmcache.md", "json")[number]
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    found: dict[str, Any] = json.loads(text)
    return found


def adapter_spec(socket: Path, **params: Any) -> dict[str, Any]:
    """What `--l2-adapter` is given; patient on a busy machine."""
    spec = page_json(0)
    spec["adapter_params"] |= {"socket": str(socket), "timeout_s": 20.0, "patience_s": 20.0}
    spec["adapter_params"] |= params
    return spec


class LMCacheServer:
    """One server process; also a context manager. *l2*: another adapter than ours."""

    def __init__(
        self, socket: Path, l2: dict[str, Any] | None = None, *, l1_gb: float = L1_GB, **params: Any
    ) -> None:
        self.port, self._http = free_port(), free_port()
        self._log = TemporaryFile()  # noqa: SIM115 - open as long as the process
        words = shlex.split(snippets_of("lmcache.md", "sh")[1].replace("\\\n", " "))
        assert words.pop(0) == "lmcache"
        for option, value in {
            "--port": str(self.port), "--http-port": str(self._http), "--l1-size-gb": str(l1_gb),
            "--l2-adapter": json.dumps(l2 or adapter_spec(socket, **params)),
        }.items():  # fmt: skip
            words[words.index(option) + 1] = value
        self.process = subprocess.Popen(
            [
                engine_python("lmcache"), "-m", "lmcache.cli.main", *words,
                "--supported-transfer-mode", "auto",
            ],
            stdout=self._log, stderr=self._log,
            env=engine_environment(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1"),
        )  # fmt: skip
        until(self._is_up, "the server is healthy")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"the server has ended: {self.said()[-5000:]}"
        try:
            return bool(self.ask("GET", "/healthcheck"))
        except OSError:
            return False

    @property
    def transfer(self) -> dict[str, Any]:
        """What vLLM's --kv-transfer-config is given."""
        return page_json(1, **{"15555": str(self.port)})

    def said(self) -> str:
        """What it has logged so far."""
        with Path(f"/proc/self/fd/{self._log.fileno()}").open(errors="replace") as log:
            return log.read()

    def see(self, daemon: Daemon) -> list[str]:
        """What the page's lines of "What to see" say."""
        return run_lines("lmcache.md", 2, **{
            "18080": str(self._http), "/var/lib/twfs": str(daemon.directory),
        })  # fmt: skip

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request to its HTTP side, and the JSON that answers it. OSError."""
        request = urllib.request.Request(
            f"http://localhost:{self._http}{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def clear(self) -> None:
        """Empty its memory, so that the next lookup is answered by L2."""
        self.ask("POST", "/cache/clear", {"tier": "l1", "force": False})

    def close(self) -> None:
        """End the process and wait for its end."""
        self.process.terminate()
        self.process.wait()
        with Path(LOG).open("a") as log:
            log.write(self.said())
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
