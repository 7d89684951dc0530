"""When loading is sooner done than computing, from what this engine has lately been seen to do.

Estimates only decide between two right answers, so they may be rough: running means, no model of
the hardware. Used by one thread.
"""

from typing import Final

from twfs.errors import InvalidInput

WEIGHT: Final = 0.2  # of the newest observation
TOKENS_MIN: Final = 64  # of a step that tells how fast computing is; shorter ones are overhead
LOAD_OVERHEAD_S: Final = 0.005  # of any load: a match, a join, a step of the engine
OPTIMISM: Final = 0.95  # of the time of loads, per load that was declined: it is tried again
DEADLINE_S: Final = 2.0  # of a load, at most


class BreakEven:
    """Seconds per token of computing and of loading; None until seen.

    InvalidInput, at the engine's start, if what the operator gave is no such number.
    """

    def __init__(
        self, *, tokens_min: int | None = None, deadline_s: float | None = None
    ) -> None:  # fmt: skip
        if tokens_min is not None and (type(tokens_min) is not int or tokens_min < 0):
            raise InvalidInput(
                f"min_load_tokens is {tokens_min!r:.40}: give a whole number of tokens, or nothing"
            )
        if deadline_s is not None and (type(deadline_s) not in {int, float} or not deadline_s > 0):
            raise InvalidInput(
                f"load_deadline_s is {deadline_s!r:.40}: give seconds above 0, or leave it out"
            )
        self.tokens_min = tokens_min  # fewer are never loaded; None: as estimated
        self.given_s = deadline_s  # that every load may take; None: as estimated
        self.compute_s: float | None = None
        self.load_s: float | None = None
        self.declined = 0

    def computed(self, tokens: int, seconds: float) -> None:
        """Note a step of the engine."""
        if tokens >= TOKENS_MIN and seconds > 0:
            self.compute_s = _mean(self.compute_s, seconds / tokens)

    def loaded(self, tokens: int, seconds: float) -> None:
        """Note a load, from its match to its end."""
        if tokens > 0:
            self.load_s = _mean(self.load_s, max(0.0, seconds - LOAD_OVERHEAD_S) / tokens)

    def pays(self, tokens: int) -> bool:
        """Tell whether loading *tokens* is worth it."""
        if self.tokens_min is not None:
            good = tokens >= self.tokens_min
        elif self.compute_s is None or self.load_s is None:
            good = True
        else:
            good = LOAD_OVERHEAD_S + tokens * self.load_s < tokens * self.compute_s
        if not good:
            self.declined += 1
            if self.load_s is not None:
                self.load_s *= OPTIMISM
        return good

    def deadline_s(self, tokens: int) -> float:
        """How long a load of *tokens* may take: as long as computing them, 2 s at most."""
        if self.given_s is not None:
            return self.given_s
        if self.compute_s is None:
            return DEADLINE_S
        return min(DEADLINE_S, max(self.compute_s * tokens, 2 * LOAD_OVERHEAD_S))


def _mean(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now
