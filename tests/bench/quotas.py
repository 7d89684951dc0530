"""Three tenants at twice their quotas beside a fourth: none over its limit, none the worse for it.

`python tests/bench/quotas.py TRACES [--hours 1] [--seeds 3] [--floods 3] [--json FILE]` deals the
sessions of TRACES to four tenants by turns and replays their requests, of so many hours, through a
real warehouse: all together, and each tenant's alone on a device of just its share, which is half
of the blocks that it uses. Together three have that as their quota, the fourth has none; the device
holds the sum. Then the same without any quota, with weights alone, where the three bring more:
`--floods` times their sessions. What each is charged is watched at every reservation.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from twfs.index.charges import Charges
from twfs.warehouse import Warehouse
from twfs_tools.output import say
from twfs_tools.replay import drive
from twfs_tools.replay.options import tenant_map, tenants_made
from twfs_tools.replay.streams import Stream, make_stream
from twfs_tools.replay.traces import Session, read_traces

TENANTS = 4
WITHOUT = "tenant4"  # no quota, and no flood
HOUR_MS = 3_600_000


class Watched(Counter[int]):
    """What puts have reserved, by tenant; looks at what is used whenever it grows."""

    def __init__(self, charges: Charges) -> None:
        super().__init__(charges.reserved)
        self._charges = charges
        self.highest: Counter[int] = Counter()

    def __setitem__(self, tenant: int, value: int) -> None:
        grows = value > self[tenant]
        super().__setitem__(tenant, value)
        if grows:
            self.highest[tenant] = max(self.highest[tenant], self._charges.used(tenant))


@dataclass
class Result:
    """Token hit rates in percent by tenant, and the most bytes that each ever used."""

    rates: dict[str, float]
    highest: dict[str, int]
    unit_bytes: int
    evicted_blocks: int
    findings: list[str]


def part(stream: Stream, mask: "np.ndarray[Any, Any]") -> Stream:
    """The requests of *stream* where *mask* is true, in their order and at their times."""
    rows = np.flatnonzero(mask)
    chains = [stream.chain(row) for row in rows.tolist()]
    lengths = [len(chain) for chain in chains]
    blocks = np.concatenate(chains) if chains else np.zeros(0, np.int64)
    used, numbers = np.unique(blocks, return_inverse=True)
    parent = stream.parent[used]
    return replace(
        stream,
        **{
            name: getattr(stream, name)[rows]
            for name in ("at_ms", "session", "model", "tenant", "prompt_tokens", "answer_tokens")
        },
        stop=[stream.stop[row] for row in rows.tolist()],
        first=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int64),
        blocks=numbers.reshape(-1).astype(np.int64),
        parent=np.where(parent < 0, parent, np.searchsorted(used, parent)),
        **{name: getattr(stream, name)[used] for name in ("depth", "block_model", "block_tenant")},
    )


def rates_of(stream: Stream, hits: "np.ndarray[Any, Any]") -> dict[str, float]:
    """Tokens that were there of those asked for, in percent, by tenant."""
    found = {}
    for number, name in enumerate(stream.tenants):
        mine = stream.tenant == number
        asked = int(stream.prompt_tokens[mine].sum())
        if asked:
            found[name] = 100 * int(hits[mine].sum()) * stream.block_tokens / asked
    return found


def run(
    stream: Stream, capacity: int, prepare: Callable[[Warehouse], None], directory: Path
) -> Result:
    """Replay *stream* on a device of *capacity* blocks."""
    watched: list[Watched] = []
    warehouses: list[Warehouse] = []

    def prepared(warehouse: Warehouse) -> None:
        prepare(warehouse)
        warehouses.append(warehouse)
        charges = warehouse._core.charges
        watched.append(Watched(charges))
        charges.reserved = watched[0]

    setup = drive.Setup(capacity, prepare=prepared)
    outcome = drive.replay(stream, setup, directory, np.zeros(len(stream), np.int64))
    tenants = warehouses[0].tenants()
    return Result(
        rates_of(stream, outcome.hits),
        {tenants.name_of(number): most for number, most in watched[0].highest.items()},
        outcome.unit_bytes, outcome.evicted_blocks, outcome.findings,
    )  # fmt: skip


def flooded(sessions: list[Session], times: int) -> list[Session]:
    """*sessions*, and *times* - 1 more like each of those of the tenants that flood."""
    dealt = tenant_map(sessions, TENANTS, [])
    more = [
        replace(session, name=f"{session.name}+{number}", scope=f"{session.scope}+{number}")
        for session in sessions
        if dealt(session.name) != WITHOUT
        for number in range(1, times)
    ]
    return sessions + more


def compare(
    sessions: list[Session], seed: int, hours: float, directory: Path, times: int
) -> dict[str, Any]:
    """All together and each alone; with quotas if *times* is 1, else a flood under weights."""
    dealt = tenant_map(sessions, TENANTS, [])
    stream = make_stream(
        flooded(sessions, times), window_s=3600, seed=seed,
        tenant_of=lambda name: dealt(name.partition("+")[0]),
    )  # fmt: skip
    stream = part(stream, stream.at_ms < hours * HOUR_MS)
    shares, alone = {}, {}
    for number, name in enumerate(stream.tenants):
        mine = part(stream, stream.tenant == number)
        # With a flood, all want more than what they had without it.
        shares[name] = len(np.unique(mine.blocks)) // (2 * (times if name != WITHOUT else 1))
        if times == 1 or name == WITHOUT:
            one = run(mine, shares[name], tenants_made([name], {}, {}), directory)
            alone[name] = one.rates[name]
    capacity = sum(shares.values())
    unit = drive.Setup(capacity).unit_bytes
    quotas = {
        name: share * unit for name, share in shares.items() if name != WITHOUT and times == 1
    }
    together = run(stream, capacity, tenants_made(stream.tenants, quotas, shares), directory)
    return {
        "seed": seed, "hours": hours, "times": times, "requests": len(stream),
        "capacity_blocks": capacity, "evicted_blocks": together.evicted_blocks,
        "findings": together.findings,
        "tenants": {
            name: {
                "share_blocks": shares[name],
                "quota_bytes": quotas.get(name),
                "highest_bytes": together.highest.get(name, 0),
                "over_quota": name in quotas and together.highest[name] > quotas[name],
                "alone": round(alone[name], 2) if name in alone else None,
                "together": round(together.rates[name], 2),
                "moved": round(together.rates[name] - alone[name], 2) if name in alone else None,
            }
            for name in sorted(shares)
        },
    }  # fmt: skip


def main() -> int:
    """Run and print; 1 if a quota was passed or a hit rate fell by more than a point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--floods", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sessions = read_traces(given.traces)
    found = []
    bad = 0
    for seed in range(1, given.seeds + 1):
        for times in (1, given.floods):
            result = compare(sessions, seed, given.hours, given.directory, times)
            found.append(result)
            kind = "quotas" if times == 1 else f"a flood of {times} x under weights"
            say(f"seed {seed}, {kind}: "
                  f"{result['requests']} requests, {result['capacity_blocks']} blocks, "
                  f"{result['evicted_blocks']} evicted, findings {result['findings']}")  # fmt: skip
            for name, row in result["tenants"].items():
                say(f"  {name}: {row}")
                moved = row["moved"]
                bad += row["over_quota"] or (moved is not None and moved < -1)
            bad += len(result["findings"])
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
