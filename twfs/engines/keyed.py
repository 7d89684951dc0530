"""For engines that name blocks by keys of their own and hardly say in which order these come.

A KeyedStore has one client for all models of such an engine and the places of keys as far as they
were seen; a Space is what keys of one layout, tenant and salt may hit. Nothing here raises because
of the store: see attaching.py. Thread-safe; calls block, so make them on threads of your own.
"""

import hashlib
import os
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from twfs.client import ARENA_BYTES
from twfs.engines.attaching import Attachment, Quiet, quiet_client
from twfs.engines.identity import name_of_model, revision_of_files
from twfs.errors import InvalidInput, NoSuchBlock, StaleEpoch, WeightsChanged
from twfs.hints import NO_HINT, Hint
from twfs.layout import Layout
from twfs.prefix import Names, OwnKey, names_of_keys
from twfs.store import (
    BlockInfo,
    LeasedMatch,
    Model,
    ModelInfo,
    Pieces,
    PutOutcome,
    ReadOutcome,
    iterate_heads,
)

PLACES_MAX: Final = 1 << 18  # keys whose place is remembered: about 60 MiB
PATIENCE_S: Final = 1.0  # for an answer: threads ask here, and no engine's loop waits
READ_TIMEOUT_S: Final = 5.0  # then computing it again is sooner done
GAPS_MAX: Final = 4  # absent blocks in a row, behind which nothing more is looked for
TAG_BYTES: Final = 8  # at the end of a key as it is stored: of which salt it is
STORED: Final = frozenset({PutOutcome.PUBLISHED, PutOutcome.PRESENT})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key stands: the key before it, and the end of its block in tokens."""

    parent: bytes | None
    end_position: int


UNKNOWN: Final = Place(None, 0)


class Places:
    """The places of keys, as far as they were seen in order; the least recently used are forgotten.

    What nobody has shown is a beginning: such a block is a chain of its own in listings, and
    matches all the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: OrderedDict[bytes, Place] = OrderedDict()

    def learn(self, keys: Sequence[bytes], block_tokens: int, before: Sequence[bytes] = ()) -> None:
        """Note that *keys* follow each other, and *before* them all that starts their chain."""
        parent, end = (before[-1] if before else None), len(before) * block_tokens
        with self._lock:
            for key in keys:
                end += block_tokens
                self._places[key] = Place(parent, end)
                self._places.move_to_end(key)
                parent = key
            while len(self._places) > PLACES_MAX:
                self._places.popitem(last=False)

    def follow(self, keys: Sequence[bytes], block_tokens: int) -> None:
        """Take those of *keys* that nobody has shown for followers of the ones before them."""
        with self._lock:
            for parent, key in pairwise(keys):
                if key not in self._places:
                    end = self._places.get(parent, UNKNOWN).end_position
                    self._places[key] = Place(parent, end + block_tokens if end else 0)

    def of(self, key: bytes) -> Place:
        """The place of *key*; position 0 if it is not known."""
        with self._lock:
            return self._places.get(key, UNKNOWN)


@dataclass(slots=True)
class _Lock:
    """A match, and how many of its blocks are still locked."""

    match: LeasedMatch
    blocks: int


class Space:
    """The blocks of one layout, tenant and salt; see the module's docstring. Made by KeyedStore.

    A salt is part of a block's name and never stored; a tag of it ends the key that is.
    """

    def __init__(
        self, store: "KeyedStore", attachment: Attachment, tenant: str | None, salt: str
    ) -> None:
        self.layout = attachment.layout
        self._store = store
        self._attachment = attachment
        self._tenant = tenant
        self._salt = salt
        self._guard = threading.Lock()
        self._locks: defaultdict[bytes, deque[tuple[_Lock, int]]] = defaultdict(deque)

    def _named(self, keys: Sequence[bytes]) -> tuple[Model, Names] | None:
        """The model and the names of *keys*, with the places that are known; None: no model."""
        model = self._attachment.model(self._tenant)
        if model is None:
            return None
        tag = self._store.tag_of(model, self._salt)
        own = [
            OwnKey(key + tag, None if at.parent is None else at.parent + tag, at.end_position)
            for key, at in ((key, self._store.places.of(key)) for key in keys)
        ]
        return model, names_of_keys(model.root(self._salt.encode()), own)

    def put(
        self, keys: Sequence[bytes], payloads: Sequence[Pieces], hint: Hint = NO_HINT
    ) -> Sequence[PutOutcome]:
        """Store, and say what became of each; all FAILED if it could not be tried."""
        failed = (PutOutcome.FAILED,) * len(keys)
        work = partial(self._put, keys, payloads, hint)
        return self._attachment.quietly("a store failed", work, None) or failed

    def _put(
        self, keys: Sequence[bytes], payloads: Sequence[Pieces], hint: Hint
    ) -> Sequence[PutOutcome] | None:
        named = self._named(keys)
        if named is None:
            return None
        try:
            outcomes = self._store.client.put(*named, payloads, hint=hint).outcomes
        except StaleEpoch:
            self._attachment.doubt(self._tenant)
            raise
        short = [outcome for outcome in outcomes if outcome not in STORED]
        self._attachment.count("stored blocks", len(outcomes) - len(short))
        if short:
            why = f"{len(short)} of {len(outcomes)} blocks"
            self._attachment.complain(f"a store was short ({short[0]})", why)
        return outcomes

    def lookup(self, keys: Sequence[bytes], *, start: int = 0) -> int:
        """How many of *keys* are there, those before *start* being the engine's own."""

        def work() -> int:
            named = self._named(keys)
            return start if named is None else self._store.client.lookup(*named, start=start)

        return max(start, self._attachment.quietly("a lookup failed", work, start))

    def renew(self) -> bool:
        """Make all blocks of this layout unreachable, of all tenants; False if nobody answered."""
        return self._attachment.new_epoch()

    def touch(self, keys: Sequence[bytes], hint: Hint = NO_HINT) -> None:
        """Count a use of *keys*, however they were served."""

        def work() -> None:
            named = self._named(keys)
            if named is not None:
                self._store.client.touch(*named, hint)

        self._attachment.quietly("a touch failed", work, None)

    def lock(self, keys: Sequence[bytes]) -> list[int]:
        """Lease those of *keys* that are there until unlock, and return their places.

        One message where they are a chain; a few gaps cost one more each.
        """
        return self._attachment.quietly("a lookup failed", partial(self._lock, keys), None) or []

    def _lock(self, keys: Sequence[bytes]) -> list[int]:
        named = self._named(keys)
        found: list[int] = []
        at = gaps = 0
        while named is not None and at < len(keys) and gaps < GAPS_MAX:
            match = self._store.client.match(*named, start=at)
            gaps = 0 if match.blocks > at else gaps + 1
            lock = _Lock(match, match.blocks - at)
            with self._guard:
                for place in range(at, match.blocks):
                    self._locks[keys[place]].append((lock, place))
            found += range(at, match.blocks)
            at = match.blocks + 1
        if not found:
            self._attachment.doubt(self._tenant)
        return found

    def match(self, keys: Sequence[bytes], *, start: int = 0) -> LeasedMatch | None:
        """Lease the longest part of a chain that is there behind *start*; None if nothing is.

        What is before *start* the engine has itself, and has used too.
        """

        def work() -> LeasedMatch | None:
            named = self._named(keys)
            return None if named is None else self._store.client.match(*named, start=start)

        match = self._attachment.quietly("a lookup failed", work, None)
        if match is not None and match.blocks > start:
            return match
        self._attachment.doubt(self._tenant)
        return None

    def held(self, keys: Sequence[bytes]) -> int:
        """As lookup, but -1 where nobody could be asked."""

        def work() -> int:
            named = self._named(keys)
            if named is None:
                return -1
            model, names = named
            return self._store.client.explain(model.id, names, tenant=model.tenant).hit_blocks

        return self._attachment.quietly("a lookup failed", work, -1)

    def unlock(self, keys: Sequence[bytes]) -> None:
        """Take back one lock of each of *keys* that has one; a lease ends with its last."""
        over = []
        with self._guard:
            for key in keys:
                if locks := self._locks.get(key):
                    lock, _ = locks.popleft()
                    lock.blocks -= 1
                    over += [] if lock.blocks else [lock.match]
                if not locks:
                    self._locks.pop(key, None)
        for match in over:
            self._attachment.quietly("a release failed", match.release, None)

    def read(
        self, keys: Sequence[bytes], into: Sequence[Pieces], timeout_s: float | None = None
    ) -> list[int]:
        """Read each of *keys* into its memory; returns the places of those that are right.

        Those that are not locked are locked for as long as it takes.
        """
        with self._guard:
            lacking = [key for key in keys if key not in self._locks]
        if lacking:
            lacking = [lacking[place] for place in self.lock(lacking)]
        with self._guard:
            locks = [self._locks[key][0] if key in self._locks else None for key in keys]
        right: list[int] = []
        for run in runs_of(locks):
            work = partial(self._read, run, locks, into, timeout_s)
            loaded: list[int] | None = self._attachment.quietly("a load failed", work, None)
            right += loaded or []
        self.unlock(lacking)
        return right

    def _read(
        self, run: list[int], locks: "Sequence[tuple[_Lock, int] | None]", into: Sequence[Pieces],
        timeout_s: float | None,
    ) -> list[int]:  # fmt: skip
        """Read blocks that follow each other in one match."""
        lock = locks[run[0]]
        assert lock is not None
        report = lock[0].match.read_into(
            [into[place] for place in run], first=lock[1], timeout_s=timeout_s
        )
        if report.blocks < len(run):
            self._attachment.complain("a load was short", report.outcomes[report.blocks])
        outcomes = zip(run, report.outcomes, strict=True)
        right = [place for place, outcome in outcomes if outcome is ReadOutcome.HIT]
        self._attachment.count("loaded blocks", len(right))
        return right

    def remove(self, keys: Sequence[bytes]) -> bool:
        """Remove *keys*, and what goes on from them with them, for nothing would find it.

        False if that could not be done, or not of all.
        """
        return self._attachment.quietly(
            "a removal failed", partial(self._remove, keys), default=False
        )

    def _remove(self, keys: Sequence[bytes]) -> bool:
        named = self._named(keys)
        if named is None:
            return False
        model, names = named
        for index in range(len(names)):
            with suppress(NoSuchBlock):
                self._store.client.remove(model.id, names.hash_at(index), below=True)
        return True


class KeyedStore(Quiet):
    """The daemon behind *socket*, whether or not it is there now; see the module's docstring."""

    def __init__(
        self, engine: str, socket: str, *, arena_bytes: int = ARENA_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:  # fmt: skip
        super().__init__(engine)
        self.socket = socket
        self.places = Places()
        self.client = quiet_client(Path(socket), arena_bytes=arena_bytes, patience_s=patience_s)
        self._patience_s = patience_s
        self._spaces: dict[tuple[bytes, str | None, str], Space] = {}
        self._attachments: dict[bytes, Attachment] = {}  # by fingerprint
        self._salts: dict[bytes, str] = {}  # by their tags, as far as they were seen

    def space(self, layout: Layout, tenant: str | None = None, salt: str = "") -> Space:
        """The space of the blocks of *layout*, whose model is named after its `model`."""
        fingerprint = layout.fingerprint
        with self._lock:
            attachment = self._attachments.get(fingerprint)
            if attachment is None:
                attachment = self._attachments[fingerprint] = Attachment(
                    self.socket, name_of_model(layout.model), layout, patience_s=self._patience_s,
                    store=self.client,
                )  # fmt: skip
            key = (fingerprint, tenant, salt)
            if key not in self._spaces:
                self._spaces[key] = Space(self, attachment, tenant, salt)
            return self._spaces[key]

    def tag_of(self, model: Model, salt: str) -> bytes:
        """What ends the keys of *salt* as they are stored; noted, so that listings can tell it."""
        tag = bytes(TAG_BYTES)
        if salt:
            tag = hashlib.blake2b(salt.encode(), digest_size=TAG_BYTES, key=model.salt).digest()
        self._salts[tag] = salt
        return tag

    def models(self) -> Iterator[ModelInfo]:
        """All models of this engine."""
        return (info for info in self.client.models() if info.layout.engine == self.name)

    def blocks(self, model: ModelInfo) -> Iterator[tuple[bytes, str, BlockInfo]]:
        """Key, salt and block of all of *model*, but those of salts not seen since the start."""
        seen: set[bytes] = set()
        for block in self._listed(model):
            own, known = block.block.key, {bytes(TAG_BYTES): "", **self._salts}
            salt = known.get(own[-TAG_BYTES:])
            if salt is not None and block.key.prefix_hash not in seen:
                seen.add(block.key.prefix_hash)  # one that sessions share comes with each
                yield own[:-TAG_BYTES], salt, block

    def _listed(self, model: ModelInfo) -> Iterator[BlockInfo]:
        for head in iterate_heads(self.client, model.id):
            with suppress(NoSuchBlock):  # evicted since it was listed
                yield from self.client.chain_of(model.id, head)
        for key in self.client.detached(model.id):
            with suppress(NoSuchBlock):
                yield self.client.block_info(key)

    def statistics(self) -> dict[str, Any]:
        """Counters, and those of each model by its name."""
        with self._lock:
            attachments = list(self._attachments.values())
        return {**super().statistics(), **{each.name: each.statistics() for each in attachments}}

    def close(self) -> None:
        """End all I/O and leases. Idempotent."""
        self.quietly("closing", self.client.close, None)


def runs_of(locks: "Sequence[tuple[_Lock, int] | None]") -> Iterator[list[int]]:
    """Places of *locks* whose blocks follow each other in one match; those of no lock are out."""
    run: list[int] = []
    for place, lock in enumerate(locks):
        before = locks[run[-1]] if run else None
        if before and lock and (lock[0] is before[0] and lock[1] == before[1] + 1):
            run.append(place)
        else:
            yield from [run] if run else []
            run = [place] if lock else []
    yield from [run] if run else []


class Revisions:
    """What tells the weights behind a model's name: *given*, by that name.

    That is the directory where they lie, or text such as a commit. A name that is a directory
    itself needs none. Weights that change after the first look are told no more: an engine that
    has loaded the old ones gives no sign of it, and its KV would be taken for that of the new.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._known: dict[str, tuple[object, str]] = {}  # by path, with what its files were then
        self._changed: set[str] = set()  # paths
        self._last: dict[str, str] = {}  # by model
        self._lock = threading.Lock()  # so that the last look is the latest

    def of(self, model: str) -> str:
        """The revision of *model*. InvalidInput if nothing tells it: others' KV would hit then.

        WeightsChanged, which is one, from the first change on.
        """
        with self._lock:
            revision = self._last[model] = self._look(model)
        return revision

    def last(self, model: str) -> str:
        """What `of` returned last, without a look at the files; as `of` where it never did."""
        return self._last.get(model) or self.of(model)

    def _look(self, model: str) -> str:
        """The revision of *model* now. InvalidInput, and OSError where its files are not there."""
        given = self._given.get(model, "")
        for path in (given, model):
            if path and (path in self._known or Path(path).is_dir()):
                return self._of_files(path)
        if not given or given.startswith("/"):
            raise InvalidInput(
                f"nothing tells which weights {model!r} are: say in `revisions` where they lie, or "
                f"their commit{given and f' ({given} is no directory)'}"
            )
        return given

    def _of_files(self, path: str) -> str:
        """The revision of the files in *path*, read again when one of them is another."""
        with os.scandir(path) as found:
            files = [(each.name, each.stat()) for each in found]
        # A copy may keep its source's time of writing, but not that of its own last change.
        now = sorted(
            (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in files
        )
        before, revision = self._known.get(path, (None, ""))
        if before != now:
            fresh = revision_of_files(path)
            if fresh != (revision or fresh):
                self._changed.add(path)
            self._known[path] = (now, fresh)
            revision = fresh
        if path in self._changed:
            raise WeightsChanged(
                f"the weights in {path} have changed since they were first seen: their KV is "
                "neither stored nor found until this server and all engines on it were restarted"
            )
        return revision
