"""How far a put is with reading the caller's memory, which an engine wants back soon.

Not a place for the copying itself, which is in datapath/upload.py.
"""

import threading
from collections.abc import Callable


class Copying:
    """How far a put is with reading its payloads, for a caller who needs their memory again.

    Thread-safe. Once `done`, the payloads are read no more; what is stored goes on.
    """

    def __init__(self, when_done: Callable[[], None] = lambda: None) -> None:
        self._when_done = when_done
        self._lock = threading.Lock()
        self._begun = False
        self._done = threading.Event()
        self.given_up = False  # the put ends with GivenUp where it next waits for room

    def begin(self) -> bool:
        """Say that reading begins; False if the caller has given up, and nothing may be read."""
        with self._lock:
            self._begun = self._begun or not self.given_up
            return self._begun

    def give_up(self) -> None:
        """Let the put fail rather than wait for room; `done` at once unless reading has begun."""
        with self._lock:
            self.given_up = True
            begun = self._begun
        if not begun:
            self.finish()

    def finish(self) -> None:
        """Say that the payloads are read no more; called by whoever puts. Idempotent."""
        with self._lock:
            first = not self._done.is_set()
            self._done.set()
        if first:
            self._when_done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `done`; False after *timeout_s* seconds."""
        return self._done.wait(timeout_s)
