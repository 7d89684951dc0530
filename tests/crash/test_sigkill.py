"""A writer that is killed at any moment loses nothing that it reported, and leaves no damage.

Killed at random moments, and at the n-th write or flush of each of its threads.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from support.crashing import FOREVER, Report, Survivor, received, write
from support.tracing import STRACE, needs_strace
from support.warehouses import DEVICE_BYTES, make_warehouse

REPOSITORY = Path(__file__).parents[2]
KILLS = 25
SYSCALLS = "pwrite64,pwritev,pwritev2,fdatasync,fsync,msync"


def child(directory: Path, seed: int, pipe: Connection) -> None:
    """The writer that is to be killed."""
    write(directory, seed, FOREVER, pipe.send)


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_loses_nothing_it_reported(scratch: Path) -> None:
    make_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES))
    context = multiprocessing.get_context("forkserver")  # a child starts without importing
    context.set_forkserver_preload(["support.crashing"])
    chance = random.Random(20)
    survivor = Survivor(scratch)
    for seed in range(KILLS):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(scratch, seed, there))
        process.start()
        there.close()
        reports: list[Report] = [here.recv() for _ in range(chance.randrange(12))]
        process.join(timeout=chance.random() * 0.02)  # into the midst of the next one
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        survivor.note(reports + received(here))
        here.close()
        survivor.verify()
    assert len(survivor.durable) > 20


@needs_strace
@pytest.mark.slow
def test_a_writer_killed_at_every_nth_write_or_flush_loses_nothing_it_reported(
    scratch: Path,
) -> None:
    make_warehouse(scratch)
    survivor = Survivor(scratch)
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    for number in (1, 2, 3, 4, 5, 7, 9, 12, 16, 23):
        inject = f"inject={SYSCALLS}:signal=SIGKILL:when={number}"
        done = subprocess.run(
            [
                str(STRACE), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SYSCALLS}",
                "-e", inject,
                sys.executable, "-m", "support.crashing", str(scratch), str(number), "200",
            ],
            env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}, done
        lines = [line.split() for line in done.stdout.splitlines()]
        survivor.note([(kind, int(a), int(b), int(c)) for kind, a, b, c in lines])
        survivor.verify()
    assert survivor.durable
