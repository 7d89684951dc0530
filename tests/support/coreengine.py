"""The engines' core as an engine uses it: a scheduler and its workers over a real daemon."""

import hashlib
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Final

from support.daemon import PATIENT_S, Daemon
from twfs.engines.attaching import Attachment
from twfs.engines.finding import Finder
from twfs.engines.requests import NO_PARAMS
from twfs.engines.transfers import Done, Offer, Run, Transfers
from twfs.hints import Hint
from twfs.layout import Arrangement, Group, Layout

BLOCK_BYTES: Final = 40_000  # no multiple of 4 KiB, so that padding matters
BLOCK_TOKENS: Final = 16


def layout_of(shards: int = 1, model: str = "core") -> Layout:
    group = Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=BLOCK_BYTES)
    return Layout(model, (group,), BLOCK_TOKENS, shards=shards)


def keys_of(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count)]


class Engine:
    """A scheduler and its workers, each with a connection of its own."""

    def __init__(self, daemon: Daemon, layout: Layout, patience_s: float = PATIENT_S) -> None:
        def attach(arena_bytes: int) -> Attachment:
            return Attachment(
                daemon.socket, layout.model, layout, arena_bytes=arena_bytes, patience_s=patience_s
            )

        self.scheduler = attach(0)
        self.finder = Finder(self.scheduler, BLOCK_TOKENS)
        self.attached = [attach(8 << 20) for _ in range(layout.shards)]
        self.workers = [Transfers(each, shard=shard) for shard, each in enumerate(self.attached)]
        self.jobs = 0

    def ask(self, request: str, keys: list[bytes], start: int = 0) -> int:
        """Ask until there is an answer, as a scheduler does step by step."""
        while (blocks := self.finder.ask(request, keys, start)) is None:
            time.sleep(0.001)
        return blocks

    def offer(self, keys: list[bytes], first: int = 0, hint: Hint = NO_PARAMS.hint) -> Offer:
        self.finder.admit("offer")
        while (epoch := self.finder.epoch("offer")) is None:
            time.sleep(0.001)
        parent = keys[first - 1] if first else None
        run = Run(tuple(keys[first:]), parent, first)
        return Offer((run,), epoch, hint=hint, since=self.finder.since)

    def end(self, worker: int, job: int) -> Done:
        """Wait for one job of a worker, as an engine does step by step."""
        while not (finished := self.workers[worker].finished()):
            time.sleep(0.001)
        (done,) = finished
        assert done.job == job
        return done

    def store(self, keys: list[bytes], payloads: Sequence[Any], worker: int = 0) -> None:
        """Store a chain and wait until it is published."""
        self.jobs += 1
        held: SimpleQueue[int] = SimpleQueue()
        self.workers[worker].store(self.jobs, self.offer(keys), payloads, stored=held.put)
        assert self.end(worker, self.jobs).blocks == len(keys)
        assert held.get() == len(keys)

    def load(self, request: str, first: int, into: Sequence[Any], worker: int = 0) -> Done:
        held = self.finder.held(request, first, len(into))
        assert held is not None
        self.jobs += 1
        self.workers[worker].load(self.jobs, held, into, timeout_s=PATIENT_S)
        return self.end(worker, self.jobs)

    def close(self) -> None:
        self.finder.close()
        for worker in self.workers:
            worker.close()
        for attached in (self.scheduler, *self.attached):
            attached.close()
