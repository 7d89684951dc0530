"""What benchmarks run in processes of their own: clients that publish, and a load beside matches.

Each is started by spawn, connects for itself and ends by itself.
"""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from threading import BrokenBarrierError
from typing import Final

from twfs.client import Client, connect
from twfs.errors import DeviceError, TwfsError
from twfs_tools.bench.scratch import (
    CLIENT_TIMEOUT_S,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
)

BARRIER_TIMEOUT_S: Final = 60.0
ARENA_BYTES: Final = 16 << 20  # four clients and the benchmark's own fit into a daemon's 256 MiB


@dataclass(frozen=True, slots=True)
class Publisher:
    """What a publishing client does: *puts* puts of *blocks* blocks each."""

    socket: Path
    block_bytes: int
    blocks: int
    puts: int


@dataclass(frozen=True, slots=True)
class Published:
    """What publishing clients took: from the first begin to the last end, and for each put."""

    seconds: float
    latencies: list[float]  # seconds


def _connect(work: Publisher) -> Client:
    """Connect with an arena that leaves room for other clients of one daemon."""
    return connect(
        work.socket,
        arena_bytes=ARENA_BYTES,
        connect_timeout_s=CLIENT_TIMEOUT_S,
        match_timeout_s=CLIENT_TIMEOUT_S,
    )


def publish(work: Publisher, barrier: Barrier, answer: Connection) -> None:
    """Put sessions once all clients are at *barrier*; sends what went wrong, or some times.

    They are when the first put began, and when each ended.
    """
    try:
        with _connect(work) as client:
            model = client.open_model(f"small-{work.block_bytes}", opaque_layout(work.block_bytes))
            payloads = random_payloads(work.blocks, work.block_bytes)
            sessions = [random_names(model, work.blocks) for _ in range(work.puts)]
            barrier.wait(BARRIER_TIMEOUT_S)
            times = [time.monotonic()]
            for names in sessions:
                require_stored(client.put(model, names, payloads))
                times.append(time.monotonic())
            answer.send(times)
    except (TwfsError, OSError, BrokenBarrierError) as error:
        barrier.abort()
        answer.send(str(error) or "another client failed")


def publish_together(work: Publisher, clients: int) -> Published:
    """Let *clients* processes publish at once.

    DeviceError with the words of one that failed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit a client and its threads
    barrier = context.Barrier(clients)
    answers, workers = [], []
    for _ in range(clients):
        mine, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=publish, args=(work, barrier, theirs))
        worker.start()
        theirs.close()  # so that the end of a worker ends the wait for its answer
        answers.append(mine)
        workers.append(worker)
    spans: list[list[float]] = []
    try:
        for answer in answers:
            said = answer.recv()
            if isinstance(said, str):
                raise DeviceError(f"a publishing client failed: {said}")
            spans.append(said)
    except EOFError as error:
        raise DeviceError("a publishing client died without a word") from error
    finally:
        for worker in workers:
            worker.join()
    return Published(
        max(times[-1] for times in spans) - min(times[0] for times in spans),
        [after - before for times in spans for before, after in pairwise(times)],
    )


def publish_until(work: Publisher, stop: Event) -> None:
    """Put sessions until *stop* is set: the load beside another measurement."""
    with _connect(work) as client:
        model = client.open_model("busy", opaque_layout(work.block_bytes))
        payloads = random_payloads(work.blocks, work.block_bytes)
        while not stop.is_set():
            client.put(model, random_names(model, work.blocks), payloads)


@contextmanager
def load(socket: Path, folder: Path | None) -> Iterator[None]:
    """Publish from another process, and read *folder* of the mount with tar, during the block."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=publish_until, args=(Publisher(socket, 64 << 10, 32, 0), stop))
    writer.start()
    reader = None
    if folder is not None:
        loop = 'while :; do tar cf - "$0" | cat >/dev/null; done'
        reader = subprocess.Popen(
            ["/bin/sh", "-c", loop, str(folder)],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield
    finally:
        stop.set()
        if reader is not None:
            os.killpg(reader.pid, signal.SIGTERM)
            reader.wait()
        writer.join()
