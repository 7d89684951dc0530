"""The sums of what tenants held and were served, as the metadata keeps them.

What they mean and who adds to them is in core/metering.py. Not thread-safe: the warehouse's lock.
"""

from dataclasses import dataclass, field
from typing import Final

import msgspec

from twfs.errors import InvalidInput

META: Final = "meter"  # in the meta table
PREFILL_TOKENS_MAX: Final = 100_000_000  # of one report; a long prompt has a million
PREFILL_SECONDS_MAX: Final = 86_400


def check_prefill(tokens: int, seconds: float) -> None:
    """Raise InvalidInput unless so many tokens in so many seconds can be a measured prefill."""
    if not 1 <= tokens <= PREFILL_TOKENS_MAX or not 0 < seconds <= PREFILL_SECONDS_MAX:
        raise InvalidInput(
            f"prefill of {tokens} tokens in {seconds} s: 1 to {PREFILL_TOKENS_MAX} tokens in more "
            f"than 0 and at most {PREFILL_SECONDS_MAX} s can be counted"
        )


class Sums(msgspec.Struct, array_like=True):
    """What one tenant had of one model in one class, up to the last persist."""

    byte_ms: int = 0
    tokens: int = 0
    blocks: int = 0


class Reads(msgspec.Struct, array_like=True):
    """What readers delivered to one tenant of one model."""

    blocks: int = 0
    payload_bytes: int = 0


class Rate(msgspec.Struct, array_like=True):
    """Prefill that engines measured: tokens in seconds, the older the less."""

    tokens: float = 0.0
    seconds: float = 0.0


class _Kept(msgspec.Struct, frozen=True):
    """What the metadata keeps: rows of tenant, model, class and sums."""

    since_ms: int
    rows: list[tuple[int, str, int, Sums]] = []
    reads: list[tuple[int, str, Reads]] = []
    rates: dict[str, Rate] = {}


@dataclass(slots=True)
class Meter:
    """The sums of an open warehouse, beside what its charges have gathered since."""

    since_ms: int  # when it was first switched on
    sums: dict[tuple[int, str, int], Sums] = field(default_factory=dict)
    reads: dict[tuple[int, str], Reads] = field(default_factory=dict)
    rates: dict[str, Rate] = field(default_factory=dict)

    @classmethod
    def load(cls, data: bytes | None, now_ms: int) -> "Meter":
        """What the metadata has; a new one if that is nothing, or unreadable: it is no truth."""
        try:
            kept = None if data is None else msgspec.json.decode(data, type=_Kept)
        except (msgspec.DecodeError, ValueError, RecursionError):
            kept = None
        if kept is None:
            return cls(now_ms)
        return cls(
            kept.since_ms,
            {(tenant, model, rank): sums for tenant, model, rank, sums in kept.rows},
            {(tenant, model): reads for tenant, model, reads in kept.reads},
            dict(kept.rates),
        )

    def pack(self) -> bytes:
        """What the metadata keeps."""
        return msgspec.json.encode(
            _Kept(
                self.since_ms,
                [(*account, sums) for account, sums in self.sums.items()],
                [(*account, reads) for account, reads in self.reads.items()],
                self.rates,
            )
        )
