"""What tenants hold over time, are served, and are spared: for status, metrics and bills.

Byte-hours follow the charges, on the warehouse's clock; tokens are counted as they are matched, and
what readers delivered when a lease ends. The sums are kept in the metadata, and are at most
PERSIST_S behind there: so much a crash may lose. Seconds of prefill that were spared are tokens
through the model's rate, which is given (`twfs.toml`) or what engines measured and reported.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.core.state import Core
from twfs.hints import Retention
from twfs.index.charges import MS_PER_HOUR
from twfs.metadata.meter import META, Rate, Reads, Sums
from twfs.metadata.tables import WriteView
from twfs.store import Served
from twfs.units import ModelId

PERSIST_S: Final = 20  # the tender's turn
RATE_TOKENS: Final = 1_000_000  # a measured rate is of about so many tokens, so that it follows
ANY_MODEL: Final = "*"  # of the rates that are given
CLASSES: Final = tuple(Retention)


def count_match(
    core: Core, tenant: int, model: ModelId, slots: "npt.NDArray[np.int64]", block_tokens: int
) -> None:
    """Count tokens served: *slots* are of one block for each place in the chain. Hold the lock."""
    ranks, counts = np.unique(core.slots.retention[slots], return_counts=True)
    for rank, count in zip(ranks.tolist(), counts.tolist(), strict=True):
        cell = core.charges.cell((tenant, model, rank))
        cell.matched_blocks += count
        cell.matched_tokens += count * block_tokens


def count_reads(core: Core, token: bytes, served: Sequence[Served]) -> None:
    """Count what was read under the lease *token*, which is not over. Hold the lock."""
    of = core.leases.account_of(token) if served else None
    if of is not None:
        reads = core.meter.reads.setdefault((of[0], _name_of(core, of[1])), Reads())
        reads.blocks += sum(part.blocks for part in served)
        reads.payload_bytes += sum(part.payload_bytes for part in served)


def count_prefill(core: Core, model: ModelId, tokens: int, seconds: float) -> None:
    """Let the rate of *model* be what an engine measured."""
    with core.lock:
        if model not in core.models:
            return
        rate = core.meter.rates.setdefault(_name_of(core, model), Rate())
        kept = RATE_TOKENS / max(RATE_TOKENS, rate.tokens + tokens)
        rate.tokens = (rate.tokens + tokens) * kept
        rate.seconds = (rate.seconds + seconds) * kept


def _name_of(core: Core, model: ModelId) -> str:
    """A model's name; a number in words for one that has gone."""
    record = core.models.get(model)
    return f"model-{model}" if record is None else record.name


def fold(core: Core) -> None:
    """Add what the charges have gathered to the sums. Hold the lock."""
    now_ms = core.clock()
    for (tenant, model, rank), cell in core.charges.cells.items():
        cell.settle(now_ms)
        if cell.byte_ms or cell.matched_blocks:
            sums = core.meter.sums.setdefault((tenant, _name_of(core, model), rank), Sums())
            sums.byte_ms += cell.byte_ms
            sums.tokens += cell.matched_tokens
            sums.blocks += cell.matched_blocks
            cell.byte_ms = cell.matched_tokens = cell.matched_blocks = 0


def persist(core: Core) -> "Future[None]":
    """Queue what there is for the metadata; at most PERSIST_S apart, and at the end."""
    with core.lock:
        fold(core)
        data = core.meter.pack()

    def job(view: WriteView) -> None:
        view.set_meta(META, data)

    return core.metadata.submit(job)


def rate_of(core: Core, model: str) -> tuple[float, str] | None:
    """Tokens a second of prefill, and whether they are "given" or "measured"; None: unknown."""
    given = core.config.prefill.get(model, core.config.prefill.get(ANY_MODEL))
    if given is not None:
        return given, "given"
    rate = core.meter.rates.get(model)
    if rate is None or not rate.tokens or not rate.seconds:
        return None
    return rate.tokens / rate.seconds, "measured"


def figures(core: Core) -> dict[str, Any]:
    """What tenants are charged now, and what is metered; JSON-ready. Hold the lock."""
    charges, tenants = core.charges, core.tenants
    fold(core)
    numbers = {each.id for each in tenants} | set(charges.holders())
    models = {model for _, model, _ in core.meter.sums}
    rates = {model: rate for model in sorted(models) if (rate := rate_of(core, model))}
    return {
        "charged": {
            tenants.name_of(number): {
                "held_bytes": charges.held[number],
                "reserved_bytes": charges.reserved[number],
                "quota_bytes": tenants.quota_of(number) or 0,
                "weight": tenants.weight_of(number),
            }
            for number in sorted(numbers)
        },
        "metered_since_ms": core.meter.since_ms,
        "metered": [
            _row(core, account, sums, rates) for account, sums in sorted(core.meter.sums.items())
        ],
        "reads": [
            {"tenant": tenants.name_of(tenant), "model": model, "read_blocks": reads.blocks,
             "read_bytes": reads.payload_bytes}
            for (tenant, model), reads in sorted(core.meter.reads.items())
        ],
        "prefill_rates": {
            model: {"tokens_per_s": round(rate, 3), "rate_is": source}
            for model, (rate, source) in rates.items()
        },
    }  # fmt: skip


def _row(
    core: Core, account: tuple[int, str, int], sums: Sums, rates: dict[str, tuple[float, str]]
) -> dict[str, Any]:
    """One row of what is metered; without a rate nobody can say what was spared."""
    tenant, model, rank = account
    rate = rates.get(model)
    return {
        "tenant": core.tenants.name_of(tenant),
        "model": model,
        "class": CLASSES[min(rank, len(CLASSES) - 1)].value,
        "byte_hours": sums.byte_ms / MS_PER_HOUR,
        "served_tokens": sums.tokens,
        "served_blocks": sums.blocks,
        "prefill_seconds_saved": None if rate is None else sums.tokens / rate[0],
    }
