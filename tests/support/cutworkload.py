"""What writes while the power is cut: a process with a real warehouse that tells what is durable.

`python -m support.cutworkload DIRECTORY CONTROL SEED TURNS [--durability D] [--broken WRITER]`
puts chains and branches, several at once, matches, evicts and removes. Before every turn and
behind it, it puts a Mark into the log of the disks it works on (CONTROL is their socket): what
stands in the log before a mark had happened when it was made. A broken writer is one of BROKEN.
"""

import argparse
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import lmdb  # noqa: TID251
import msgspec

from support.faultydisks import Control
from support.warehouses import chain_of, payloads_of, records_of, settle, stop_tending
from twfs.core.state import Core
from twfs.datapath.putting import Put
from twfs.devices.device import Device
from twfs.layout import Group, Layout
from twfs.prefix import Names
from twfs.records import BlockKey
from twfs.store import Model, PutOutcome
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

# Blocks of 512 KiB: a few dozen fill two devices of 16 MiB, so that space is soon used again, and
# an image is soon looked at. The other model has two shards: complete only after two publishes.
LAYOUTS: Final = {
    "wide": Layout("wide", (Group(8, 8, 128, dtype="float16"),), 16),
    "sharded": Layout("sharded", (Group(2, 4, 8, dtype="float16"),), 16, shards=2),
}
SEEDS: Final = 30  # chains of each model that do not begin alike
BLOCKS_MAX: Final = 5  # of one put
FORKS: Final = (-1, -1, 1, 3)  # blocks shared with seed 0; -1 is a chain of its own
EVICTED_BYTES: Final = ByteCount(1 << 20)
FILLED: Final = 0.8  # of the space, before the turns begin: from then on space is used again


class Session(msgspec.Struct, frozen=True, array_like=True):
    """A chain that is put: model, seed, fork (see FORKS) and blocks."""

    model: str
    seed: int
    fork: int
    blocks: int

    def names(self, model: Model) -> Names:
        """Its names in *model*'s epoch."""
        return chain_of(model, self.blocks, self.seed, fork=None if self.fork < 0 else self.fork)


class Mark(msgspec.Struct, frozen=True):
    """One mark: the *turn* of these *sessions* is about to begin, or has ended.

    *held* are the full names (BlockKey, hex) of all blocks there are then, None before a turn.
    Within a turn, *going* are blocks that are about to be taken out, *back* those that a put which
    has returned has published: of two puts at once one may evict what the other stores again.
    """

    turn: int
    what: str
    sessions: list[Session]
    held: list[str] | None = None
    going: list[str] = []
    back: list[str] = []


class Workload:
    """An open warehouse and what is done to it."""

    def __init__(self, warehouse: Warehouse, control: Control, chance: random.Random) -> None:
        self.warehouse = warehouse
        self.models = {name: warehouse.open_model(name, layout) for name, layout in LAYOUTS.items()}
        self.chance = chance
        self.control = control
        self.turn = 0
        self.telling = threading.Lock()
        self.sessions: list[Session] = []  # that were put
        self.threads = ThreadPoolExecutor(2)
        self.tell_of_removals()

    def tell_of_removals(self) -> None:
        """Say of every removal what it takes, before it is queued."""
        remove = Core.submit_removal

        def told(core: Core, model: Any, keys: list[BlockKey], **more: Any) -> Any:
            self.within(going=keys)
            return remove(core, model, keys, **more)

        setattr(Core, "submit_removal", told)  # noqa: B010 - mypy knows another signature

    def held(self) -> list[str]:
        """The full names of all blocks, once everything queued is durable."""
        while self.warehouse._core.evicting:
            settle(self.warehouse)
        settle(self.warehouse)
        return [key.pack().hex() for key in records_of(self.warehouse._core)]

    def mark(self, what: str, sessions: list[Session], held: list[str] | None = None) -> None:
        """Say in the log how far this is."""
        mark = Mark(self.turn, what, sessions, held)
        with self.telling:
            self.control.mark(msgspec.json.encode(mark).decode())

    def within(self, **names: list[BlockKey]) -> None:
        """Say in the log what happens within a turn."""
        packed = {what: [key.pack().hex() for key in keys] for what, keys in names.items()}
        mark = Mark(self.turn, "within", [], **packed)
        with self.telling:
            self.control.mark(msgspec.json.encode(mark).decode())

    def random_session(self) -> Session:
        """Choose a session; most are of the wide model."""
        model = self.chance.choice(["wide", "wide", "wide", "wide", "sharded"])
        fork = self.chance.choice(FORKS)
        blocks = max(fork, 0) + self.chance.randint(1, BLOCKS_MAX - max(fork, 0))
        return Session(model, self.chance.randrange(1, SEEDS), fork, blocks)

    def put(self, session: Session) -> None:
        """Put all groups and shards of *session*, as far as there is room."""
        self.sessions.append(session)
        model = self.models[session.model]
        names = session.names(model)
        for shard in range(model.layout.shards):
            payloads = payloads_of(model.layout, names, 0, shard)
            result = self.warehouse.put(model, names, payloads, shard=shard)
            self.within(
                back=[
                    BlockKey(model.id, names.hash_at(index), 0, shard)
                    for index, outcome in enumerate(result.outcomes)
                    if outcome is PutOutcome.PUBLISHED
                ]
            )

    def some_head(self) -> list[Session]:
        """One of the sessions that were put and are heads; none if there is none."""
        heads = []
        for session in dict.fromkeys(self.sessions):
            names = session.names(model := self.models[session.model])
            if names.hash_at(len(names) - 1) in self.warehouse.heads(model.id):
                heads.append(session)
        return self.chance.sample(heads, min(len(heads), 1))

    def remove(self, session: Session) -> None:
        """Remove *session*, which is a head; half the time while it is leased."""
        model = self.models[session.model]
        names = session.names(model)
        head = names.hash_at(len(names) - 1)
        if self.chance.random() < 0.5:
            with self.warehouse.match(model, names):
                self.warehouse.remove(model.id, head)
        else:
            self.warehouse.remove(model.id, head)

    def step(self) -> None:
        """Do one turn, between two marks."""
        self.turn += 1
        sessions = [self.random_session()]
        (what,) = self.chance.choices(["put", "put two", "evict", "remove"], [5, 3, 1, 3])
        if what == "put two":
            sessions.append(self.random_session())
        elif what == "remove":
            sessions = self.some_head()
        self.mark(what, sessions)
        match what:
            case "put":
                self.put(sessions[0])
            case "put two":
                list(self.threads.map(self.put, sessions))
            case "remove":
                for session in sessions:
                    self.remove(session)
            case _:
                self.warehouse.evict(EVICTED_BYTES)
        self.mark(what, sessions, self.held())

    def fill(self) -> None:
        """Fill the warehouse, in one turn."""
        self.mark("fill", [])
        while self.warehouse.space().free_bytes > (1 - FILLED) * self.warehouse.space().total_bytes:
            self.put(self.random_session())
        self.mark("fill", self.sessions, self.held())


def no_flush(patch: Callable[[Any, str, Any], None]) -> None:
    """A writer that never flushes its devices."""
    patch(Device, "flush", lambda _: None)


def late_flush(patch: Callable[[Any, str, Any], None]) -> None:
    """A writer that publishes first and flushes then."""
    publish, flush = Put.publish, Put._flush

    def hasty(put: Put) -> Any:
        result = publish(put)
        flush(put)
        return result

    patch(Put, "_flush", lambda _: None)
    patch(Put, "publish", hasty)


def no_sync(patch: Callable[[Any, str, Any], None]) -> None:
    """A writer whose metadata is not synced."""
    right = lmdb.open

    def careless(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "sync": False})

    patch(lmdb, "open", careless)


BROKEN: Final = {"no-flush": no_flush, "late-flush": late_flush, "no-sync": no_sync}


def main() -> None:
    """Be the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("control", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("turns", type=int)
    parser.add_argument("--durability")
    parser.add_argument("--broken", choices=BROKEN)
    given = parser.parse_args()
    if given.broken:
        BROKEN[given.broken](setattr)
    options = {"durability": given.durability} if given.durability else {}
    warehouse = Warehouse.open(given.directory, **options)
    stop_tending(warehouse)  # what it does would be between no two marks
    workload = Workload(warehouse, Control(given.control), random.Random(given.seed))
    workload.fill()
    for _ in range(given.turns):
        workload.step()
    os._exit(0)  # what a clean end would flush, a power cut does not


if __name__ == "__main__":
    main()
