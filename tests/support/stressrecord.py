"""What one process of the stress run did: counts, longest calls, and what must not happen.

Counts are in a file renewed twice a second, since the process may be killed at any time; what must
not happen is a line of another file at once.
"""

import json
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twfs.client import Client
from twfs.errors import TwfsError

T = TypeVar("T")


class Reported(Exception):
    """An exception out of twfs that has been written down."""


class Record:
    """What one process did. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._longest: dict[str, float] = {}
        self._calls: dict[int, tuple[str, float]] = {}  # by thread: what it is in, since when
        self._broken = os.open(path.with_suffix(".jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, name: str, count: int = 1) -> None:
        """Count *count* more of *name*."""
        with self._lock:
            self._counts[name] += count

    def broken(self, kind: str, **details: Any) -> None:
        """Write down at once what must not happen."""
        line = json.dumps({"kind": kind, "pid": os.getpid(), **details}, default=str) + "\n"
        os.write(self._broken, line.encode())

    def call(self, name: str, work: Callable[[], T], *allowed: type[TwfsError]) -> T | None:
        """Return what *work* returns, None if it raises what is *allowed*; note how long it took.

        Any other exception is written down, and raised.
        """
        thread, began = threading.get_ident(), time.monotonic()
        with self._lock:
            self._calls[thread] = (name, began)
        try:
            return work()
        except allowed as error:
            with self._lock:
                self._refusals[f"{name}: {type(error).__name__}"] += 1
            return None
        except Exception as error:
            self.broken(
                "exception", call=name, error=repr(error), trace=traceback.format_exc(limit=-6)
            )
            raise Reported from error
        finally:
            with self._lock:
                del self._calls[thread]
                self._counts["operations"] += 1
                self._counts[f"calls.{name}"] += 1
                self._note_longest(name, time.monotonic() - began)

    def _note_longest(self, name: str, seconds: float) -> None:
        self._longest[name] = max(self._longest.get(name, 0.0), seconds)

    def flush(self, client: Client | None) -> None:
        """Put what is known so far into the file, whole or not at all."""
        with self._lock:
            for name, began in self._calls.values():
                self._note_longest(name, time.monotonic() - began)
            found = {
                "counts": dict(self._counts),
                "refusals": dict(self._refusals),
                "longest": dict(self._longest),
                "misses": {},
            }
        if client is not None:
            with client._lock:
                found["misses"] = dict(client._misses)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.replace(self._path)
