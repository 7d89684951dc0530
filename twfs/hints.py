"""What a request says of the session it belongs to: class wanted, why it ended, when it is back.

Only the words and their bounds; what becomes of them is in metadata/sessions.py and
eviction/evicting.py.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from twfs.errors import InvalidInput

SESSION_BYTES_MAX: Final = 128  # of an engine's id of a session, in UTF-8
RETURN_MS_MAX: Final = (1 << 32) - 1  # 49 days: who comes back later than that says nothing


class Retention(StrEnum):
    """Retention classes, in the order of their numbers in records: 0 to 3."""

    EPHEMERAL = "ephemeral"
    STANDARD = "standard"
    DURABLE = "durable"
    PINNED = "pinned"

    @property
    def rank(self) -> int:
        """The number in records and headers."""
        return RANKS[self]


class Stop(StrEnum):
    """Why a request ended: of agents that called a tool 86 % are back within a minute."""

    TOOL_USE = "tool_use"
    END_TURN = "end_turn"
    OTHER = "other"

    @property
    def code(self) -> int:
        """The number in the arrays in memory: from 1; 0 is a request that did not say."""
        return CODES[self]


RANKS: Final = {each: number for number, each in enumerate(Retention)}
CODES: Final = {each: number for number, each in enumerate(Stop, 1)}


def flaw_of(session: object, return_ms: object) -> str:
    """What is wrong with an id and a time of return, in one sentence; empty if nothing is."""
    if not isinstance(session, str):
        return f"a session's id is text, not {session!r:.80}"
    try:
        length = len(session.encode())
    except UnicodeEncodeError:
        return f"a session's id is no UTF-8: {session!r:.80}"
    if length > SESSION_BYTES_MAX:
        return f"a session's id has {length} bytes; at most {SESSION_BYTES_MAX} are kept: hash it"
    if not session.isprintable():
        return f"a session's id has characters that cannot be printed: {session!r:.80}"
    if return_ms is not None and (
        not isinstance(return_ms, int)
        or isinstance(return_ms, bool)
        or not 0 <= return_ms <= RETURN_MS_MAX
    ):
        return f"a session is expected back in {return_ms!r:.80} ms: give 0 to {RETURN_MS_MAX}"
    return ""


@dataclass(frozen=True, slots=True)
class Hint:
    """What a request says of its session; all of it may be missing. InvalidInput if malformed."""

    session: str = ""  # the engine's id of it, <= 128 bytes of UTF-8; "": the chain's head is it
    retention: Retention | None = None  # the class wanted for the session
    stop: Stop | None = None  # why the request ended
    return_ms: int | None = None  # how soon the session is expected back

    def __post_init__(self) -> None:
        flaw = flaw_of(self.session, self.return_ms)
        if flaw:
            raise InvalidInput(flaw)
        if not isinstance(self.retention, Retention | None) or not isinstance(
            self.stop, Stop | None
        ):
            raise InvalidInput(
                f"a hint with the class {self.retention!r} and the stop {self.stop!r}: give a "
                "twfs.Retention and a twfs.Stop"
            )


NO_HINT: Final = Hint()


def check_session(session: str) -> str:
    """*session* if it is an id of a session; InvalidInput if it is empty or malformed."""
    flaw = flaw_of(session, None) if session else "the empty id names no session: give its head"
    if flaw:
        raise InvalidInput(flaw)
    return session
