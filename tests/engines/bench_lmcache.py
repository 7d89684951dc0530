"""LMCache's own benchmark of L2 adapters, on twfs and on its `fs_native` with O_DIRECT, in turn.

`.venv/bin/python tests/engines/bench_lmcache.py [--rounds N] [--keys N] [--kib N]`: a fresh daemon
on an image file, a directory beside it, below TWFS_TEST_DIR; LMCache from TWFS_ENGINES. A store
ends with twfs when it is durable, with fs_native when it is written. Prints what LMCache prints.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

TESTS: Final = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from support.daemon import running_daemon  # noqa: E402
from support.engines import ENGINES, engine_environment  # noqa: E402
from support.lmcaches import adapter_spec  # noqa: E402

DEVICE_BYTES: Final = 8 << 30


def run(name: str, spec: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Run the benchmark on one adapter."""
    print(f"== {name}", flush=True)  # noqa: T201 - a program
    command = [
        str(ENGINES / "lmcache/bin/python"), "-m", "lmcache.cli.main", "bench", "l2",
        "--l2-adapter", json.dumps(spec), "--l1-align-bytes", "4096",
        "--num-keys", str(arguments.keys), "--rounds", str(arguments.rounds),
        "--data-size-kb", str(arguments.kib), "--no-skip-verify",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=engine_environment(LMCACHE_TRACK_USAGE="false"))


def main() -> None:
    """Benchmark both, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="times that both take their turn")
    parser.add_argument("--rounds", type=int, default=8, help="of each operation in one turn")
    parser.add_argument("--keys", type=int, default=32, help="blocks of one round")
    parser.add_argument("--kib", type=int, default=2048, help="of a block")
    parser.add_argument("--in-place", action="store_true", help="loads without timeout, uncopied")
    arguments = parser.parse_args()
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TWFS_TEST_DIR")) as directory:
            files = Path(directory) / "files"
            files.mkdir()
            with running_daemon(Path(directory) / "w", device_bytes=DEVICE_BYTES) as daemon:
                timeout: dict[str, Any] = {"timeout_s": None} if arguments.in_place else {}
                spec = adapter_spec(daemon.socket, revisions={"bench-model": "1"}, **timeout)
                run("twfs", spec, arguments)
            native = {"type": "fs_native", "base_path": str(files), "use_odirect": True}
            run("fs_native", native, arguments)


if __name__ == "__main__":
    main()
