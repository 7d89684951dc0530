"""What `twfs advise` says: from the access record, and from what the warehouse holds just now.

The record is read where the command runs, not in the daemon: it tells where it lies, after it has
written down what was pending, and what it alone knows.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from twfs.admin.divergence import partings, sentence
from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.hints import RANKS, Retention
from twfs.policy.accesses import Group, Kind, sums_of, totals_of
from twfs.policy.asking import Asked, Bools, asked_of, live_sessions, within_bounds
from twfs.policy.miniature import simulate
from twfs.policy.scoring import policy_of
from twfs.units import ALIGN

DAY_MS: Final = 86_400_000
DAYS_PER_YEAR: Final = 365.25
SPAN_MS_MIN: Final = 60_000  # rates by the day of less are no rates
FACTORS: Final = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the capacity there is
PARTINGS_MAX: Final = 1000
CLASSES: Final = {rank: str(retention) for retention, rank in RANKS.items()}


@dataclass(frozen=True)
class Live:
    """What the open warehouse knows: names, space, and who holds how much. JSON-ready."""

    record: str = ""  # the directory of the access record
    on: bool = True
    total_bytes: int = 0
    used_bytes: int = 0
    matched_blocks: int = 0  # since it was opened
    asked_blocks: int = 0
    models: dict[int, str] = field(default_factory=dict)
    tenants: dict[int, str] = field(default_factory=dict)
    held: list[tuple[int, int, int]] = field(default_factory=list)  # tenant, class, bytes
    policy: str = "reuse"  # of eviction
    attention_tokens: int = 0  # that it goes by; see scoring.Reuse


@dataclass(frozen=True)
class Wishes:
    """What the operator gives beside: capacities, and what the drives can bear."""

    capacities: tuple[int, ...] = ()
    tbw_bytes: int | None = None  # that may be written to all drives together
    dwpd: float | None = None  # or drive writes per day
    warranty_years: float = 5.0  # for so long
    idle_ms: int = 3_600_000  # a session is live as long as it is away for less


def live(core: Core) -> Live:
    """Write the record down, and say what is known now."""
    core.recorder.flush(core.counters.written_bytes + core.counters.moved_bytes)
    with core.lock:
        held: Counter[tuple[int, int]] = Counter()
        for (tenant, _, retention), cell in core.charges.cells.items():
            held[tenant, retention] += cell.held_bytes
        total = core.allocator.total_bytes
        return Live(
            str(core.recorder.directory.absolute()), core.recorder.on, total,
            total - core.allocator.free_bytes, core.counters.matched_blocks,
            core.counters.asked_blocks,
            {number: record.name for number, record in core.models.items()},
            {each.id: each.name for each in core.tenants} | {0: core.tenants.name_of(0)},
            [(*account, size) for account, size in sorted(held.items()) if size],
            core.policy.name, core.config.eviction.attention_tokens,
        )  # fmt: skip


class AskPartings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many rows of `prompts`."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=PARTINGS_MAX)] = 20


def verbs(core: Core) -> Verbs:
    """`record` and `prompts`."""
    return {
        "record": Verb(NoArguments, lambda _: live(core)),
        "prompts": Verb(
            AskPartings,
            lambda asked: [
                {**asdict(each), "advice": sentence(each)} for each in partings(core, asked.limit)
            ],
        ),
    }


def advise(record: Group, now: Live, wishes: Wishes) -> dict[str, Any]:
    """The document of `twfs advise`; shapes and units are in its keys."""
    totals = sums_of(record.totals, totals_of(record.rows))
    thin = within_bounds(record)
    found = asked_of(thin, now.used_bytes)
    policy = policy_of(now.policy, now.attention_tokens)
    asked = float((totals["asked"] * totals["tokens"]).sum())
    held = float((totals["held"] * totals["tokens"]).sum())
    days = max(record.last_ms - record.first_ms, SPAN_MS_MIN) / DAY_MS
    written = record.written_bytes / days
    capacities = sorted({
        *(wishes.capacities or (int(now.total_bytes * factor) for factor in FACTORS)),
        *((now.total_bytes,) if now.total_bytes else ()), int(found.footprint_bytes) + 1,
    } - {0})  # fmt: skip
    held_at = {capacity: simulate(found, capacity, policy) for capacity in capacities}
    rates = {capacity: found.hits(each, asked) for capacity, each in held_at.items()}
    at_present = rates.get(now.total_bytes)
    curve = [
        _point(capacity, rate, wishes, written=written, at_present=at_present)
        for capacity, rate in rates.items()
    ]
    return {
        "span_days": days, "first_ms": record.first_ms, "last_ms": record.last_ms,
        "requests": int(totals["requests"][totals["kind"] == Kind.MATCH].sum()),
        "lost_requests": record.lost, "block_part": found.rate,
        "sampled_uses": len(found.tokens), "policy": policy.name,
        "asked_tokens": int(asked), "held_tokens": int(held),
        "hit_rate": held / asked if asked else 0.0,
        "hit_rate_since_open": now.matched_blocks / now.asked_blocks if now.asked_blocks else None,
        "predicted_hit_rate": at_present,
        "ceiling": found.hits(found.before, asked),
        "total_bytes": now.total_bytes, "used_bytes": now.used_bytes,
        "footprint_bytes": int(found.footprint_bytes),
        "curve": curve,
        "writes": _writes(written, now.total_bytes, wishes),
        "tenants": _tenants(totals, found, now, held_at),
        "classes": _classes(totals, now, days),
        "models": _models(totals, now),
        "sessions": live_sessions(found, wishes.idle_ms),
    }  # fmt: skip


def _point(
    capacity: int, hits: float, wishes: Wishes, *, written: float, at_present: float | None
) -> dict[str, Any]:
    """The curve at one capacity; what is written follows what is missed."""
    misses_now = None if at_present is None else 1 - at_present
    per_day = written * (1 - hits) / misses_now if misses_now else None
    return {
        "bytes": capacity, "hit_rate": hits, "written_bytes_per_day": per_day,
        "life_years": _years(per_day, capacity, wishes),
    }  # fmt: skip


def _years(per_day: float | None, capacity: int, wishes: Wishes) -> float | None:
    """How long drives of *capacity* last; None if nobody said what they bear."""
    endurance = wishes.tbw_bytes
    if endurance is None and wishes.dwpd is not None:
        endurance = int(wishes.dwpd * capacity * DAYS_PER_YEAR * wishes.warranty_years)
    return endurance / per_day / DAYS_PER_YEAR if endurance and per_day else None


def _writes(per_day: float, capacity: int, wishes: Wishes) -> dict[str, Any]:
    return {
        "bytes_per_day": per_day,
        "drive_writes_per_day": per_day / capacity if capacity else None,
        "life_years": _years(per_day, capacity, wishes),
    }


def _share(totals: Any) -> dict[str, Any]:
    """What was asked for and held of some sums."""
    asked = int((totals["asked"] * totals["tokens"]).sum())
    held = int((totals["held"] * totals["tokens"]).sum())
    requests = int(totals["requests"][totals["kind"] == Kind.MATCH].sum())
    return {
        "requests": requests, "asked_tokens": asked, "held_tokens": held,
        "hit_rate": held / asked if asked else 0.0,
    }  # fmt: skip


def _pays(held_tokens: int, held_bytes: int, days: float) -> float | None:
    """Tokens that each GiB held saves from being computed, a day."""
    return held_tokens / days / (held_bytes / (1 << 30)) if held_bytes else None


def _tenants(
    totals: Any, found: Asked, now: Live, held_at: dict[int, Bools]
) -> list[dict[str, Any]]:
    """Each tenant's part, and what it would be with more or less for all of them."""
    record = found.record
    days = max(record.last_ms - record.first_ms, SPAN_MS_MIN) / DAY_MS
    held: Counter[int] = Counter()
    for tenant, _, size in now.held:
        held[tenant] += size
    of_row = record.rows["tenant"][found.row]
    rows = []
    for number in sorted({*totals["tenant"].tolist(), *held}):
        share = _share(totals[totals["tenant"] == number])
        where = np.asarray(of_row == number)
        rows.append({
            "name": now.tenants.get(number, f"tenant {number}"), **share,
            "held_bytes": held[number],
            "tokens_per_gib_day": _pays(share["held_tokens"], held[number], days),
            "curve": [
                {"bytes": size, "hit_rate": found.hits(each, share["asked_tokens"], where)}
                for size, each in held_at.items()
                if where.any()
            ],
        })  # fmt: skip
    return rows


def _classes(totals: Any, now: Live, days: float) -> list[dict[str, Any]]:
    """What blocks of each class gave for the room they take."""
    held: Counter[int] = Counter()
    for _, retention, size in now.held:
        held[retention] += size
    rows = []
    for rank in sorted({*totals["retention"].tolist(), *held}):
        mine = totals["retention"] == rank
        tokens = int((totals["held"][mine] * totals["tokens"][mine]).sum())
        rows.append({
            "name": CLASSES.get(rank, str(rank)), "held_tokens": tokens, "held_bytes": held[rank],
            "tokens_per_gib_day": _pays(tokens, held[rank], days),
        })  # fmt: skip
    return rows


def _models(totals: Any, now: Live) -> list[dict[str, Any]]:
    """The same by model, with what a token takes on the devices."""
    rows = []
    for number in np.unique(totals["model"]).tolist():
        mine = totals[totals["model"] == number]
        rows.append({
            "name": now.models.get(number, f"model {number}, gone"), **_share(mine),
            "token_bytes": int(mine["units"][-1]) * ALIGN / max(1, int(mine["tokens"][-1])),
        })  # fmt: skip
    return rows


assert set(CLASSES) == set(range(len(Retention)))
