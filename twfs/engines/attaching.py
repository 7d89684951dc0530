"""An engine's hold on a store that may not be there: every failure is a miss, logged once, counted.

The engines' adapters see the store through this alone, so that neither data nor a salt, a key or a
dead daemon raises into an engine's loop. Thread-safe; calls block, so make them on threads of your
own (see finding.py and transfers.py).
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from twfs.client import ARENA_BYTES, Client
from twfs.errors import TwfsError
from twfs.layout import Layout
from twfs.store import Model, Store

log = logging.getLogger("twfs.engines")

PATIENCE_S: Final = 0.25  # for an answer; the engine goes on meanwhile, so it may be this long
REOPEN_SECONDS: Final = 1.0  # a model that could not be opened is tried this often at most
FRESH_SECONDS: Final = 5.0  # so old a model may be opened again, in case its epoch is over
NAME_HEX: Final = 8  # digits of the fingerprint in a model's name: tells its layouts apart
T = TypeVar("T")


def quiet_client(socket: Path | str, *, arena_bytes: int, patience_s: float = PATIENCE_S) -> Client:
    """Return a client that connects when it is first used, whether or not a daemon is there now."""
    return Client(
        Path(socket), arena_bytes=arena_bytes, hugetlb=False, connect_timeout_s=patience_s,
        match_timeout_s=patience_s,
    )  # fmt: skip


class Quiet:
    """What keeps failures from an engine: each is counted, and logged once for each kind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._counts: Counter[str] = Counter()

    def quietly(self, what: str, call: Callable[[], T], default: T) -> T:
        """Return what *call* returns; *default* if it fails, which is counted, and logged once."""
        try:
            return call()
        except (TwfsError, OSError) as error:
            self.complain(what, error)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not end an engine either
            self.complain(what, error, unexpected=True)
        return default

    def complain(self, what: str, why: object, *, unexpected: bool = False) -> None:
        """Count *what* went wrong and log it, once for each kind of *why*."""
        kind = f"{what}: {type(why).__name__}"
        with self._lock:
            self._counts[kind] += 1
            known = kind in self._said
            self._said.add(kind)
        if not known:
            log.warning("twfs, %s: %s: %s (said once)", self.name, what, why, exc_info=unexpected)

    def count(self, what: str, number: int = 1) -> None:
        """Add *number* to the counter *what*."""
        with self._lock:
            self._counts[what] += number

    def statistics(self) -> dict[str, Any]:
        """Counters by name; failures as `what: class`."""
        with self._lock:
            return dict(self._counts)


class Attachment(Quiet):
    """One model in one store, for as long as an engine runs; see the module's docstring.

    The model's name gets 8 hex digits of the layout's fingerprint, so that no two layouts clash.
    """

    def __init__(
        self, socket: Path | str, name: str, layout: Layout, *, arena_bytes: int = ARENA_BYTES,
        patience_s: float = PATIENCE_S, store: Store | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{name}-{layout.fingerprint.hex()[:NAME_HEX]}")
        self.layout = layout
        self.patience_s = patience_s
        self.arena_bytes = arena_bytes
        self.store: Store = store or quiet_client(
            socket, arena_bytes=arena_bytes, patience_s=patience_s
        )
        self._models: dict[str | None, tuple[Model | None, float]] = {}  # by tenant; when opened
        self._doubted: set[str | None] = set()  # of these: to be opened again before the next use

    def model(self, tenant: str | None = None, *, epoch: int | None = None) -> Model | None:
        """Return the model as opened for *tenant*, None if it cannot be had now.

        With *epoch* it is opened again if it is of another, and None if it still is.
        """
        with self._lock:
            model, opened_s = self._models.get(tenant, (None, -REOPEN_SECONDS))
            now_s = time.monotonic()
            doubted = tenant in self._doubted
            if model is not None and not doubted and epoch in {None, model.epoch}:
                return model
            if model is None and now_s - opened_s < REOPEN_SECONDS:
                return None
        model = self.quietly(
            "the model cannot be opened",
            lambda: self.store.open_model(self.name, self.layout, tenant=tenant),
            None,
        )
        with self._lock:
            self._models[tenant] = (model, now_s)
            self._doubted.discard(tenant)
        return model if model is None or epoch in {None, model.epoch} else None

    def epoch(self, tenant: str | None = None) -> int | None:
        """The epoch of the model as it was last opened for *tenant*; asks nobody."""
        model = self._models.get(tenant, (None, 0.0))[0]
        return None if model is None else model.epoch

    def doubt(self, tenant: str | None = None) -> None:
        """Let the model be opened again if that is some time ago: it may have a new epoch.

        Until then the old one stands, or what the doubtful request computes would not be stored.
        """
        with self._lock:
            model, opened_s = self._models.get(tenant, (None, 0.0))
            if model is not None and time.monotonic() - opened_s > FRESH_SECONDS:
                self._doubted.add(tenant)

    def new_epoch(self) -> bool:
        """Make everything stored of this model unreachable: weights changed, or the cache reset.

        For all tenants. False if nobody answered, which is the caller's to repeat.
        """
        model = self.model()
        if model is None:
            return False
        fresh = self.quietly(
            "no new epoch could be opened", lambda: self.store.new_epoch(model), None
        )
        with self._lock:
            self._models.clear()
        return fresh is not None

    def close(self) -> None:
        """Let go of the store. Idempotent."""
        self.quietly("closing", self.store.close, None)
