"""A Store for engines that name blocks by keys of their own, which may come without any order.

Never raises into an engine because of data, a key, a salt or a dead daemon: that is a miss or a
block not stored, counted by cause and logged once for each. Thread-safe.
"""

import logging
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twfs.client import ARENA_BYTES, Client
from twfs.errors import NoSuchBlock, NoSuchModel, StaleEpoch, TwfsError
from twfs.layout import Layout
from twfs.prefix import Names, OwnKey, names_of_keys
from twfs.store import BlockInfo, Model, Namespace, Pieces, PutOutcome, iterate_heads
from twfs.units import NAME_BYTES_MAX, ModelId

log = logging.getLogger(__name__)

PLACES_MAX: Final = 1 << 18  # keys whose place in a chain is remembered: about 60 MiB
NAME_HEX: Final = 8  # digits of the fingerprint in a model's name: tells its layouts apart
ANSWER_SECONDS: Final = 1.0  # for a match: threads ask here, no engine's loop waits
STORED: Final = frozenset({PutOutcome.PUBLISHED, PutOutcome.PRESENT})


def model_name(text: str, layout: Layout) -> str:
    """A model's name: what is allowed of *text*, and digits of the layout's fingerprint."""
    clean = re.sub(r"[^A-Za-z0-9._=-]+", "-", text.replace("/", "--")).lstrip(".-") or "model"
    suffix = f"-{layout.fingerprint.hex()[:NAME_HEX]}"
    return clean[: NAME_BYTES_MAX - len(suffix)] + suffix


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key stands: the key before it, and the end of its block in tokens."""

    parent: bytes | None
    end_position: int


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

    def follow(self, parent: bytes, key: bytes, block_tokens: int) -> None:
        """Note that *key* comes behind *parent*, unless its place is known better."""
        with self._lock:
            above = self._places.get(parent)
            if key not in self._places and above is not None:
                self._places[key] = Place(parent, above.end_position + block_tokens)

    def of(self, key: bytes) -> Place:
        """The place of *key*; position 0 if it is not known."""
        with self._lock:
            return self._places.get(key) or Place(None, 0)


class KeyedStore:
    """One daemon, its models as an engine names them, and the places of keys."""

    def __init__(self, socket: str, *, arena_bytes: int = ARENA_BYTES) -> None:
        self.socket = socket
        self.places = Places()
        self.client = Client(
            Path(socket), arena_bytes=arena_bytes, hugetlb=False, connect_timeout_s=ANSWER_SECONDS,
            match_timeout_s=ANSWER_SECONDS,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._models: dict[tuple[bytes, str | None], Model] = {}
        self._counts: Counter[str] = Counter()
        with self.guarded("connect"):
            self.client.reconnect(ANSWER_SECONDS)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Let no exception through: it is counted, and logged the first time for its kind."""
        try:
            yield
        except Exception as error:
            cause = f"{what}: {type(error).__name__}"
            with self._lock:
                self._counts[cause] += 1
                first = self._counts[cause] == 1
            if first:
                log.warning(
                    "twfs: %s failed, which is a miss: %s", what, error,
                    exc_info=not isinstance(error, TwfsError),
                )  # fmt: skip

    def count(self, what: str, many: int = 1) -> None:
        """Add to one of the counters."""
        with self._lock:
            self._counts[what] += many

    def model(self, text: str, layout: Layout, tenant: str | None = None) -> Model | None:
        """The model of *layout*, named after *text*; None while nobody answers or it is refused."""
        key = (layout.fingerprint, tenant)
        model = self._models.get(key)
        if model is None:
            with self.guarded("open"):
                model = self.client.open_model(model_name(text, layout), layout, tenant=tenant)
                self._models[key] = model
        return model

    def names(self, model: Model, keys: Sequence[bytes], salt: bytes, tag: bytes = b"") -> Names:
        """Names of *keys* with the places that are known; *tag* ends each key as it is stored."""
        own = [
            OwnKey(key + tag, None if at.parent is None else at.parent + tag, at.end_position)
            for key, at in ((key, self.places.of(key)) for key in keys)
        ]
        return names_of_keys(model.root(salt), own)

    def put(self, model: Model, names: Names, payloads: Sequence[Pieces]) -> tuple[PutOutcome, ...]:
        """Store, and say what became of each; FAILED for all if it could not be tried."""
        outcomes: tuple[PutOutcome, ...] = (PutOutcome.FAILED,) * len(names)
        with self.guarded("put"):
            try:
                outcomes = self.client.put(model, names, payloads).outcomes
            except (StaleEpoch, NoSuchModel):
                self.forget_models()
                raise
        with self._lock:
            self._counts.update(f"stored: {outcome}" for outcome in outcomes)
        return outcomes

    def forget_models(self) -> None:
        """Open models anew from now on: an epoch has ended."""
        self._models.clear()

    def statistics(self) -> dict[str, Any]:
        """Counters of this adapter, and of its client under `client`."""
        with self._lock:
            counts = dict(self._counts)
        return {**counts, "client": self.client.statistics().get("client", {})}

    def close(self) -> None:
        """End all I/O and leases."""
        self.client.close()


def blocks_of(store: Namespace, model: ModelId) -> Iterator[BlockInfo]:
    """All blocks of *model*, session by session; one that sessions share comes with each."""
    for head in iterate_heads(store, model):
        with suppress(NoSuchBlock):  # evicted since it was listed
            yield from store.chain_of(model, head)
    for key in store.detached(model):
        with suppress(NoSuchBlock):
            yield store.block_info(key)
