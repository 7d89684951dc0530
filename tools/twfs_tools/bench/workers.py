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
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import TYPE_CHECKING

from twfs.client import connect
from twfs_tools.bench.scratch import (
    CLIENT_TIMEOUT_S,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
)

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

BARRIER_TIMEOUT_S = 60.0  # a worker that failed breaks the barrier for the others


@dataclass(frozen=True, slots=True)
class Publisher:
    """What a publishing client does: *puts* puts of *blocks* blocks each."""

    socket: Path
    block_bytes: int
    blocks: int
    puts: int


def publish(
    work: Publisher,
    barrier: Barrier,
    results: "SimpleQueue[tuple[float, float]]",
) -> None:
    """Put sessions once all clients stand at *barrier*; hands (began, ended) to *results*."""
    client = connect(
        work.socket, connect_timeout_s=CLIENT_TIMEOUT_S, match_timeout_s=CLIENT_TIMEOUT_S
    )
    began = ended = 0.0
    try:
        model = client.open_model(f"small-{work.block_bytes}", opaque_layout(work.block_bytes))
        payloads = random_payloads(work.blocks, work.block_bytes)
        sessions = [random_names(model, work.blocks) for _ in range(work.puts)]
        barrier.wait(BARRIER_TIMEOUT_S)
        began = time.monotonic()
        for names in sessions:
            require_stored(client.put(model, names, payloads))
        ended = time.monotonic()
    finally:
        results.put((began, ended))
        client.close()


def publish_until(work: Publisher, stop: Event) -> None:
    """Put sessions until *stop* is set: the load beside another measurement."""
    client = connect(
        work.socket, connect_timeout_s=CLIENT_TIMEOUT_S, match_timeout_s=CLIENT_TIMEOUT_S
    )
    try:
        model = client.open_model("busy", opaque_layout(work.block_bytes))
        payloads = random_payloads(work.blocks, work.block_bytes)
        while not stop.is_set():
            client.put(model, random_names(model, work.blocks), payloads)
    finally:
        client.close()


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
