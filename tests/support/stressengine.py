"""One engine of the stress run: a seeded sequence of everything that a Client can be asked for.

Every HIT is compared byte for byte with what its name says, and the memory around a destination
with what it was. Used by one thread; its client is another engine's too.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from support.stressrecord import Record
from support.workload import LAYOUTS, MODEL_ODDS, Bytes, payload_of, random_session
from twfs.client import Client
from twfs.datapath.match import Match
from twfs.errors import (
    BlockGone,
    LeaseEnded,
    NoDaemon,
    NoSuchBlock,
    NoSuchModel,
    NotEmpty,
    PromiseRefused,
    StaleEpoch,
    WarehouseFull,
)
from twfs.layout import GroupKind
from twfs.prefix import Names
from twfs.store import Model, Pieces, PutOutcome, ReadOutcome, Retention
from twfs.units import ALIGN, ByteCount, PrefixHash, align_up

T = TypeVar("T")

HELD_MAX: Final = 3  # matches an engine keeps for later
TOKENS_MAX: Final = 4  # lease tokens it has published at once
EPOCH_SECONDS: Final = 5.0  # between new epochs, over all engines, on average
CHECK_SECONDS: Final = 3.0  # between checks of the running warehouse, likewise
DOWN_SECONDS: Final = 0.05  # to wait when there is no daemon
HOARD_MATCHES: Final = 12  # taken at once, so that a put may find nothing to evict
GUARD: Final = 0xE7  # what memory around destinations holds
READ_BYTES_MAX: Final = 8 << 20  # of one read's destinations
REPORTED_BYTES: Final = 16  # of wrong bytes, in a record
EXPECTED: Final = (NoDaemon, NoSuchBlock, NotEmpty, StaleEpoch, NoSuchModel, BlockGone)
STEPS: Final = {
    "put": 24, "read": 34, "revisit": 12, "join": 8, "lookup": 8, "touch": 4, "evict": 2,
    "remove": 3, "retain": 1, "list": 2, "explain": 1, "reopen": 2, "hoard": 2,
}  # fmt: skip


@dataclass(slots=True)
class _Room:
    """Where one block is to be read: the destination, and all memory it lies in."""

    pieces: Pieces
    memory: list[tuple[Bytes, int, int]]  # each with where the destination begins and ends in it

    def found(self) -> Bytes:
        """The bytes read."""
        return np.concatenate([memory[start:stop] for memory, start, stop in self.memory])

    def overrun(self) -> bool:
        """Tell whether anything beside the destination was written to."""
        return any(
            bool((memory[:start] != GUARD).any() or (memory[stop:] != GUARD).any())
            for memory, start, stop in self.memory
        )


def _memory(byte_count: int, shift: int) -> tuple[Bytes, int, int]:
    """Guarded memory with *byte_count* bytes in it that begin *shift* behind a 4 KiB boundary."""
    raw = np.full(align_up(byte_count) + 3 * ALIGN, GUARD, np.uint8)
    start = ALIGN - raw.ctypes.data % ALIGN + shift
    return raw, start, start + byte_count


@dataclass(slots=True)
class Engine:
    """See the module's docstring."""

    client: Client
    record: Record
    models: dict[str, Model]
    stop: threading.Event
    rng: random.Random
    tokens: Path
    name: str
    engines: int
    wrong_every: int
    held: list[Match] = field(default_factory=list)
    puts: int = 0
    published: int = 0
    last_step_s: float = field(default_factory=time.monotonic)

    def step(self) -> None:
        """Do one thing."""
        now = time.monotonic()
        passed, self.last_step_s = now - self.last_step_s, now
        self.record.add("engine ms", round(passed * 1000))
        if self.rng.random() < passed / (EPOCH_SECONDS * self.engines):
            self._new_epoch()
        if self.rng.random() < passed / (CHECK_SECONDS * self.engines):
            self._check()
        steps: dict[str, Callable[[], None]] = {
            "put": self._put, "read": self._read, "revisit": self._revisit, "join": self._join,
            "lookup": self._lookup, "touch": self._touch, "evict": self._evict,
            "remove": self._remove, "retain": self._retain, "list": self._list,
            "explain": self._explain, "reopen": self._reopen, "hoard": self._hoard,
        }  # fmt: skip
        steps[self.rng.choices(list(STEPS), list(STEPS.values()))[0]]()

    def end(self) -> None:
        """Release what is held."""
        for match in self.held:
            self.record.call("release", match.release)

    # Models and sessions

    def _model(self, name: str) -> Model | None:
        """The model as this process knows it, opened if need be; None without a daemon."""
        known = self.models.get(name)
        if known is None:
            known = self.record.call(
                "open_model", lambda: self.client.open_model(name, LAYOUTS[name]), NoDaemon
            )
            if known is None:
                self.stop.wait(DOWN_SECONDS)
                return None
            self.models[name] = known
        return known

    def _session(self) -> tuple[Model, Names] | None:
        session = random_session(self.rng)
        model = self._model(session.model)
        return None if model is None else (model, session.names(model))

    def _reopen(self) -> None:
        """Forget a model, so that a new epoch is seen."""
        self.models.pop(self.rng.choice(list(MODEL_ODDS)), None)

    def _new_epoch(self) -> None:
        model = self._model(random_session(self.rng).model)
        if model is not None:
            opened = self._ask("new_epoch", lambda: self.client.new_epoch(model))
            if opened is not None:
                self.models[model.name] = opened
                self.record.add("epochs")

    def _ask(self, name: str, work: Callable[[], T]) -> T | None:
        """One of the calls that may say that there is no daemon, session, block or epoch."""
        return self.record.call(name, work, *EXPECTED)

    # Put

    def _put(self) -> None:
        chosen = self._session()
        if chosen is None:
            return
        model, names = chosen
        start = self.rng.randrange(len(names)) if self.rng.random() < 0.15 else 0
        names = names.slice(start, len(names))
        retention = self.rng.choice((Retention.STANDARD,) * 5 + tuple(Retention))
        parts = [
            (group, shard)
            for group in range(len(model.layout.groups))
            for shard in range(model.layout.shards)
        ]
        self.rng.shuffle(parts)
        for group, shard in parts:
            self._put_part(model, names, group, shard, retention)

    def _put_part(
        self, model: Model, names: Names, group: int, shard: int, retention: Retention
    ) -> None:
        """Put the blocks of one group and shard."""
        byte_count = model.layout.block_bytes(group)
        payloads: list[Pieces] = []
        for index in range(len(names)):
            payload = payload_of(
                model.name, model.epoch, names.hash_at(index), group=group, shard=shard,
                byte_count=byte_count,
            )  # fmt: skip
            payloads.append(self._cut(payload) if self.rng.random() < 0.3 else payload)
        self.puts += 1
        if self.wrong_every and self.puts % self.wrong_every == 0:
            payloads[0] = payload_of("wrong", 0, b"", group=0, shard=0, byte_count=byte_count)
        result = self.record.call(
            "put",
            lambda: self.client.put(
                model, names, payloads, group=group, shard=shard, retention=retention
            ),
            WarehouseFull, StaleEpoch,
        )  # fmt: skip
        if result is None:
            if self.rng.random() < 0.5:
                self.models.pop(model.name, None)  # the epoch may be over
            return
        if result.outcomes[0] is PutOutcome.FAILED:
            self.stop.wait(DOWN_SECONDS)
        for outcome in result.outcomes:
            self.record.add(f"put.{outcome.value}")
        if PutOutcome.COLLISION in result.outcomes:
            self.record.broken("collision", model=model.name, epoch=model.epoch)

    def _cut(self, payload: Bytes) -> list[Bytes]:
        """*payload* in a few pieces that are not neighbours in memory."""
        cuts = sorted(self.rng.sample(range(1, len(payload)), self.rng.randint(1, 4)))
        bounds = [0, *cuts, len(payload)]
        return [payload[start:stop].copy() for start, stop in itertools.pairwise(bounds)]

    # Match and read

    def _match(self) -> Match | None:
        chosen = self._session()
        if chosen is None:
            return None
        model, names = chosen
        start = self.rng.randrange(len(names)) if self.rng.random() < 0.3 else 0
        match = self.record.call("match", lambda: self.client.match(model, names, start=start))
        if match is not None:
            self.record.add("asked blocks", len(names) - start)
            self.record.add("matched blocks", match.blocks - start)
        return match

    def _read(self) -> None:
        match = self._match()
        if match is None:
            return
        if match.blocks > match.start:
            kept = len(self.held) < HELD_MAX and self.rng.random() < 0.3
            if self.rng.random() < (0.8 if kept else 0.1):
                self._publish(match)
            self._read_some(match)
            if kept:
                self.held.append(match)
                return
        self.record.call("release", match.release)

    def _hoard(self) -> None:
        """Lease much, then put."""
        matches = [match for _ in range(HOARD_MATCHES) if (match := self._match()) is not None]
        self._put()
        for match in matches:
            self.record.call("release", match.release)

    def _publish(self, match: Match) -> None:
        """Let other processes join the lease."""
        self.published = (self.published + 1) % TOKENS_MAX
        path = self.tokens / f"{self.name}-{self.published}"
        fresh = path.with_suffix(".new")
        fresh.write_bytes(match.token)
        fresh.replace(path)

    def _revisit(self) -> None:
        """Read again under a lease taken before, or renew it, or end it; sometimes forget it."""
        if not self.held:
            return
        match = self.held[self.rng.randrange(len(self.held))]
        if self.rng.random() < 0.3:
            self.record.call("renew", match.renew)
        if self.rng.random() < 0.7:
            self._read_some(match)
            return
        self.held.remove(match)
        if self.rng.random() < 0.9:
            self.record.call("release", match.release)

    def _join(self) -> None:
        """Read under the lease of another process, which may be dead by now."""
        paths = [path for path in self.tokens.iterdir() if path.suffix != ".new"]
        if not paths:
            return
        token = b""
        with suppress(FileNotFoundError):
            token = self.rng.choice(paths).read_bytes()
        match = self.record.call("join", lambda: self.client.join(token), LeaseEnded)
        if match is not None:
            self.record.add("joined")
            self._read_some(match)
            self.record.call("release", match.release)

    def _read_some(self, match: Match) -> None:
        """Read some of what *match* holds, in one of the ways there are, and compare."""
        layout = match.model.layout
        group, shard = self.rng.randrange(len(layout.groups)), self.rng.randrange(layout.shards)
        first, stop = match.start, match.blocks
        window_tokens = layout.groups[group].window_tokens
        if layout.groups[group].kind is GroupKind.WINDOW and window_tokens is not None:
            first = max(first, stop - -(-window_tokens // layout.block_tokens))
        first = self.rng.randrange(first, stop)
        layers, byte_count = None, int(layout.block_bytes(group))
        layer_count = layout.summed_layers(group)
        if layer_count and self.rng.random() < 0.3:
            begin = self.rng.randrange(layer_count)
            layers = range(begin, self.rng.randint(begin + 1, layer_count))
            byte_count = len(layers) * layout.layer_bytes(group)
        count = min(self.rng.randint(1, stop - first), max(1, READ_BYTES_MAX // byte_count))
        how = self.rng.choice(("aligned", "aligned", "unaligned", "pieces"))
        rooms = [self._room(how, byte_count) for _ in range(count)]
        destinations = [room.pieces for room in rooms]
        read = match.read_async if self.rng.random() < 0.2 else match.read_into
        report = self.record.call(
            read.__name__,
            lambda: read(destinations, group=group, shard=shard, first=first, layers=layers),
        )
        if report is not None and not hasattr(report, "outcomes"):
            report = self.record.call("result", report.result)
        if report is None:
            return
        places = (match, group, shard, first, layers, how)
        self._compare(places, rooms, report.outcomes)

    def _room(self, how: str, byte_count: int) -> _Room:
        """Make a destination of *byte_count* bytes."""
        if how == "aligned":
            raw = _memory(byte_count, 0)
            return _Room(raw[0][raw[1] : raw[2]], [raw])
        if how == "unaligned":
            raw = _memory(byte_count, self.rng.randrange(1, ALIGN))
            return _Room(raw[0][raw[1] : raw[2]], [raw])
        cut = self.rng.randrange(1, byte_count)
        raws = [_memory(size, self.rng.randrange(ALIGN)) for size in (cut, byte_count - cut)]
        return _Room([raw[start:stop] for raw, start, stop in raws], raws)

    def _compare(
        self, places: tuple[Match, int, int, int, range | None, str], rooms: list[_Room],
        outcomes: Sequence[ReadOutcome],
    ) -> None:  # fmt: skip
        """Count hits and misses; write down every wrong byte."""
        match, group, shard, first, layers, how = places
        model = match.model
        for offset, (room, outcome) in enumerate(zip(rooms, outcomes, strict=True)):
            details: dict[str, Any] = {
                "model": model.name, "epoch": model.epoch, "index": first + offset, "how": how,
                "group": group, "shard": shard, "layers": str(layers),
                "prefix_hash": match.names.hash_at(first + offset).hex(),
                "outcome": outcome.value,
            }  # fmt: skip
            if room.overrun():
                self.record.broken("overrun", **details)
            if outcome is not ReadOutcome.HIT:
                self.record.add(f"read.{outcome.value}")
                if outcome in {ReadOutcome.BAD_CHECKSUM, ReadOutcome.DEVICE_ERROR}:
                    self.record.broken("bad read under a lease", **details)
                continue
            whole = payload_of(
                model.name, model.epoch, match.names.hash_at(first + offset), group=group,
                shard=shard, byte_count=model.layout.block_bytes(group),
            )  # fmt: skip
            size = model.layout.layer_bytes(group)
            part = whole if layers is None else whole[layers.start * size : layers.stop * size]
            self._same(room.found(), part, details)

    def _same(self, found: Bytes, wanted: Bytes, details: dict[str, Any]) -> None:
        """Count a verified hit, or write down how it is wrong."""
        if np.array_equal(found, wanted):
            self.record.add("hits verified")
            return
        if len(found) != len(wanted):
            self.record.broken("wrong length", found=len(found), wanted=len(wanted), **details)
            return
        wrong = np.flatnonzero(found != wanted)
        at = int(wrong[0])
        self.record.broken(
            "wrong bytes", **details, count=len(wrong), of=len(wanted), first=at,
            last=int(wrong[-1]), found=found[at : at + REPORTED_BYTES].tobytes().hex(),
            wanted=wanted[at : at + REPORTED_BYTES].tobytes().hex(),
        )  # fmt: skip

    # All else

    def _lookup(self) -> None:
        chosen = self._session()
        if chosen is not None:
            self.record.call("lookup", lambda: self.client.lookup(*chosen))

    def _touch(self) -> None:
        chosen = self._session()
        if chosen is not None:
            self.record.call("touch", lambda: self.client.touch(*chosen))

    def _explain(self) -> None:
        chosen = self._session()
        if chosen is not None:
            self._ask("explain", lambda: self.client.explain(chosen[0].id, chosen[1]))

    def _evict(self) -> None:
        wanted = ByteCount(self.rng.randint(1, 8 << 20))
        self._ask("evict", lambda: self.client.evict(wanted))

    def _head(self) -> tuple[Model, PrefixHash] | None:
        """Some head of some model."""
        model = self._model(random_session(self.rng).model)
        if model is None:
            return None
        after = PrefixHash(self.rng.randbytes(16))
        heads = self._ask("heads", lambda: self.client.heads(model.id, after=after, limit=8))
        return (model, self.rng.choice(heads)) if heads else None

    def _remove(self) -> None:
        chosen = self._head()
        if chosen is not None:
            self._ask("remove", lambda: self.client.remove(chosen[0].id, chosen[1]))

    def _retain(self) -> None:
        chosen = self._head()
        if chosen is not None:
            retention = self.rng.choice(tuple(Retention))
            self.record.call(
                "set_retention",
                lambda: self.client.set_retention(chosen[0].id, chosen[1], retention),
                *EXPECTED, PromiseRefused,
            )  # fmt: skip

    def _list(self) -> None:
        """List as the mount does, and read a block through the daemon."""
        self._ask("models", self.client.models)
        space = self._ask("space", self.client.space)
        if space is not None and space.free_bytes > space.total_bytes:
            self.record.broken("more free than there is", space=str(space))
        chosen = self._head()
        if chosen is None:
            return
        model, head = chosen
        self._ask("sessions", lambda: self.client.sessions(model.id, limit=16))
        infos = self._ask("chain_of", lambda: self.client.chain_of(model.id, head))
        if not infos:
            return
        info = self.rng.choice(infos)
        found = self._ask("read_block", lambda: self.client.read_block(info))
        if found is not None:
            key = info.key
            wanted = payload_of(
                model.name, model.epoch, key.prefix_hash, group=key.group, shard=key.shard,
                byte_count=info.block.payload_bytes,
            )  # fmt: skip
            details = {"model": model.name, "epoch": model.epoch, "how": "read_block"}
            self._same(np.frombuffer(found, np.uint8), wanted, details | {"key": str(key)})

    def _check(self) -> None:
        """Check the warehouse in the middle of it all."""
        report = self._ask("check", lambda: self.client.check(data=self.rng.random() < 0.2))
        if report is not None:
            self.record.add("live checks")
            for finding in report.findings[:5]:
                self.record.broken("live check", finding=str(finding))
