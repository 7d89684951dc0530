"""Thousands of SIGKILLs, at random moments and at n-th system calls, of whatever works on disk.

    python tests/crash/kills.py --kills 2000 --seed 1               # the long run, 20 minutes
    python tests/crash/kills.py --kills 0 --every-syscall 200       # each of the first 200 calls

Kills the processes of support/victims.py one after the other on one warehouse that outlives them
all. After every kill (or so many-th) it is opened: all that was reported durable is there, byte
for byte, nothing is reserved or in limbo, no generation or inode is given twice, and the checker
finds nothing.

Prints one JSON document: kills of each victim and kind, and `problems`; the exit code is 0 if there
are none, else the directory stays.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[2]
SOURCES: Final = [str(REPOSITORY / part) for part in ("", "tests", "mount", "tools")]
sys.path[:0] = SOURCES

from support.crashing import Report, Survivor, received  # noqa: E402
from support.daemon import running_daemon  # noqa: E402
from support.mounting import until  # noqa: E402
from support.victims import SETTLING, VICTIMS, use  # noqa: E402
from support.warehouses import DEVICE_BYTES, make_warehouse  # noqa: E402
from twfs.client import Client, connect  # noqa: E402
from twfs.errors import TwfsError  # noqa: E402

# What changes a disk or a directory: between two others of a process nothing durable happens.
SYSCALLS: Final = (
    "pwrite64,pwritev,pwritev2,write,fdatasync,fsync,msync,rename,unlink,unlinkat,mkdir,rmdir,"
    "fallocate,ftruncate"
)
# A client changes no disk: what it does to the daemon, and to the memory that both have.
CLIENT_SYSCALLS: Final = "connect,sendto,sendmsg,recvfrom,recvmsg,ftruncate,preadv"
FIRST_REPORT_S: Final = 60.0
# Of each victim: so many reports at most are waited for, and then so many seconds at most, into the
# midst of what follows.
MOMENTS: Final = {
    "writer": (10, 0.03), "daemon": (1, 0.3), "client": (10, 0.03), "creator": (2, 0.05),
    "scrubber": (1, 0.1), "drainer": (1, 0.2), "repairer": (1, 0.2), "rebuilder": (1, 0.5),
}  # fmt: skip
TRACED_S: Final = 200.0  # a victim that makes no call for so long hangs, on a busy machine too


def child(name: str, directory: Path, seed: int, pipe: Connection) -> None:
    """The process that is to be killed."""
    VICTIMS[name](directory, seed, pipe.send)


class Engine:
    """The client of a daemon that is to be killed: puts and reads until it is gone, and reports."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.reports: list[Report] = []
        self._client: Client = connect(directory / "socket", arena_bytes=4 << 20)
        self._thread = threading.Thread(target=self._run, args=(seed,))
        self._thread.start()

    def _run(self, seed: int) -> None:
        with suppress(TwfsError):
            use(self._client, seed, self.reports.append)

    def end(self) -> list[Report]:
        """Wait for the end, which comes with the daemon's, and return what was durable."""
        self._thread.join()
        self._client.close()
        return self.reports


@contextmanager
def company(name: str, directory: Path) -> Iterator[None]:
    """What victim *name* needs beside it: a client a daemon, which lets go of the dead one."""
    if name != "client":
        yield
        return
    with running_daemon(directory) as daemon:
        yield
        with daemon.client() as other:
            until(partial(nothing_held, other), "what the dead client held is free")


def nothing_held(client: Client) -> bool:
    """Tell whether *client* is alone with its daemon: no lease, no reservation, no arena else."""
    figures = client.statistics()
    held: int = figures["leases"]["leased_bytes"] + client.space().reserved_bytes
    alone: int = figures["server"]["clients"]
    return alone == 1 and held == 0


class Run:
    """One run on one warehouse."""

    def __init__(self, directory: Path, seed: int, look_every: int) -> None:
        self.directory = directory
        self.look_every = look_every
        self.chance = random.Random(seed)
        self.survivor = Survivor(directory)
        self.kills: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        make_warehouse(directory, (DEVICE_BYTES, DEVICE_BYTES))
        self._context = multiprocessing.get_context(
            "forkserver"
        )  # a child starts without importing
        self._context.set_forkserver_preload(["support.victims"])

    def kill_one(self, name: str) -> None:
        """Start a victim, kill it at a random moment, look."""
        seed = self.chance.randrange(1 << 30)
        reports: list[Report] = []
        with self._noting(name, seed), company(name, self.directory):
            self._start_and_kill(name, seed, reports)
        self.kills[f"{name} at random"] += 1
        self.look(name, seed, reports)

    def _start_and_kill(self, name: str, seed: int, reports: list[Report]) -> None:
        """Start a victim, kill it at a random moment; *reports* gets what is durable."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=child, args=(name, self.directory, seed, there))
        process.start()
        there.close()
        engine = None
        reports_max, seconds_max = MOMENTS[name]
        for _ in range(1 if name == "daemon" else self.chance.randrange(reports_max + 1)):
            if not here.poll(FIRST_REPORT_S):
                break
            with suppress(EOFError):
                reports.append(here.recv())
        if name == "daemon" and reports:
            with suppress(TwfsError):
                engine = Engine(self.directory, seed)
        time.sleep(self.chance.random() * seconds_max)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            self._problem(name, f"ended by itself with {process.exitcode}", seed)
        reports += received(here)
        here.close()
        reports += [] if engine is None else engine.end()

    def kill_at(self, name: str, number: int) -> bool:
        """Kill a victim at its *number*-th system call; False if it never came that far."""
        reports: list[Report] = []
        killed = False
        with self._noting(name, number), company(name, self.directory):
            killed = self._trace(name, number, reports)
        self.kills[f"{name} at a system call"] += killed
        self.look(name, number, reports)
        return killed

    def _trace(self, name: str, number: int, reports: list[Report]) -> bool:
        """Run a victim under strace, which kills it; *reports* gets what is durable."""
        calls = CLIENT_SYSCALLS if name == "client" else SYSCALLS
        command = [
            "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}",
            "-e", f"inject={calls}:signal=SIGKILL:when={number}",
            sys.executable, "-m", "support.victims", name, str(self.directory), str(number),
        ]  # fmt: skip
        engine = None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            if name == "daemon" and process.stdout.readline():
                with suppress(TwfsError):
                    engine = Engine(self.directory, number)
            try:
                printed, _ = process.communicate(timeout=TRACED_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # strace alone would leave it running
                raise
            lines = [line.split() for line in printed.splitlines()]
        reports += [(kind, int(a), int(b), int(c)) for kind, a, b, c in lines]
        reports += [] if engine is None else engine.end()
        return process.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}

    @contextmanager
    def _noting(self, name: str, seed: int) -> Iterator[None]:
        """Make a finding of whatever is raised meanwhile."""
        try:
            yield
        except Exception:  # noqa: BLE001 - whatever it is, it is a finding of this run
            self._problem(name, traceback.format_exc(limit=-4), seed)

    def look(self, name: str, seed: int, reports: list[Report]) -> None:
        """Take *reports*, and see whether all that is durable is there."""
        with self._noting(name, seed):
            self.survivor.note([each for each in reports if each[0] in {"put", "gone"}])
            if name in SETTLING:
                SETTLING[name](self.directory)
            if sum(self.kills.values()) % self.look_every == 0:
                self.survivor.verify()

    def _problem(self, name: str, what: str, seed: int) -> None:
        self.problems.append({"victim": name, "seed": seed, "what": what})


def run_together(given: argparse.Namespace) -> int:
    """Let several runs share the kills, each with a warehouse and a seed of its own; one report."""
    command = [
        sys.executable, __file__, "--look-every", str(given.look_every),
        "--every-syscall", str(given.every_syscall), "--step", str(given.step),
        "--kills", str(-(-given.kills // given.processes)),
    ]  # fmt: skip
    for name in given.victim or ():
        command += ["--victim", name]
    running = [
        subprocess.Popen(
            [*command, "--seed", str(given.seed + number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(given.processes)
    ]
    reports = [json.loads(each.communicate()[0]) for each in running]
    kills: Counter[str] = Counter()
    for each in reports:
        kills.update(each["kills"])
    summed = {name: sum(each[name] for each in reports) for name in ("killed", "blocks_seen")}
    problems = [problem for each in reports for problem in each["problems"]]
    report = {
        "seed": given.seed, "processes": given.processes, "kills": dict(kills), **summed,
        "problems": problems, "seconds": max(each["seconds"] for each in reports),
    }  # fmt: skip
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return bool(problems)


def main() -> int:
    """Run, print the report, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=2000, help="at random moments")
    parser.add_argument("--every-syscall", type=int, default=0, help="the first so many of each")
    parser.add_argument("--step", type=int, default=1, help="only every so many-th of them")
    parser.add_argument("--look-every", type=int, default=1, help="at all of it; else opened only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victim", choices=sorted(VICTIMS), action="append")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="runs beside each other")
    given = parser.parse_args()
    if given.processes > 1:
        return run_together(given)
    began = time.monotonic()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="twfs-kills-"))
    os.environ["PYTHONPATH"] = os.pathsep.join(SOURCES)
    run = Run(directory / "warehouse", given.seed, given.look_every)
    names = given.victim or sorted(VICTIMS)
    for number in range(given.kills):
        run.kill_one(names[number % len(names)])
    for name in names:
        for number in range(1, given.every_syscall + 1, given.step):
            if not run.kill_at(name, number):
                break
    run.survivor.verify()
    report = {
        "seed": given.seed, "kills": dict(run.kills), "killed": sum(run.kills.values()),
        "chains": len(run.survivor.durable), "blocks_seen": len(run.survivor.lives),
        "problems": run.problems, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if not run.problems and given.directory is None:
        shutil.rmtree(directory)
    return bool(run.problems)


if __name__ == "__main__":
    sys.exit(main())
