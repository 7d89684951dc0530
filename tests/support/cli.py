"""Running the tools as a person does: as processes, with their exit codes and what they print."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twfs_tools.process import daemon_command, start_daemon, stop, unmount
from twfs_tools.target import find_mount

ROOT = Path(__file__).parents[2]
SEARCH = os.pathsep.join(str(ROOT / part) for part in ("", "mount", "tools"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": SEARCH, "TWFS_DEBUG": "0"}
IMAGE = "32M"
LAYOUT = {
    "model": "test/tiny",
    "block_tokens": 16,
    "groups": [
        {"layers": 2, "kv_heads": 2, "head_size": 16, "arrangement": "layer,kv,head,token,dim"}
    ],
}
TIMEOUT_S = 240.0  # of one that hangs


def twfs(*arguments: object, module: str = "twfs_tools.cli") -> subprocess.CompletedProcess[str]:
    """Run one tool and return how it ended."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def document(*arguments: object) -> Any:
    """Run one command with --json; it must succeed and print one document and nothing else."""
    done = twfs(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def assert_refused(
    done: subprocess.CompletedProcess[str], exit_code: int, *, name: str = "twfs"
) -> str:
    """Assert that a command ended with *exit_code* and one sentence on stderr; returns it."""
    assert done.returncode == exit_code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: "), lines
    assert len(lines[0]) > len(name) + 12, "an error says what happened"
    assert done.stdout == ""
    return lines[0]


def tree_of(path: Path) -> dict[str, str]:
    """Return every file below *path* with a hash of its content, LMDB's lock table left out."""
    if not path.exists():
        return {}
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        str(each): hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else "directory"
        for each in files
        if each.name != "lock.mdb" and not each.is_socket()
    }


def made_warehouse(directory: Path, *, image: str = IMAGE) -> Path:
    """Create a warehouse through the command line."""
    done = twfs("create", directory, "--size", image)
    assert done.returncode == 0, done.stderr
    return directory


def layout_file(path: Path, **changes: object) -> Path:
    """Write a layout, with *changes*, to *path*."""
    path.write_text(json.dumps({**LAYOUT, **changes}))
    return path


@contextmanager
def running_daemon(directory: Path, mountpoint: Path | None = None) -> Iterator[int]:
    """Run a daemon during the block; its process id. The mount is gone behind it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = SEARCH
    try:
        daemon = start_daemon(daemon_command(directory, mountpoint), directory / "daemon.log")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    try:
        yield daemon.pid
    finally:
        if mountpoint is not None and find_mount(mountpoint) is not None:
            unmount(mountpoint, lazy=True)
        stop(daemon)
