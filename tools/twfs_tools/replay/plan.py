"""All replays that one command asks for: every window, seed, capacity and policy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from twfs.config import CONFIG_FILE
from twfs.store import Durability
from twfs_tools.bench.report import environment
from twfs_tools.replay import bounds, drive
from twfs_tools.replay.figures import Figures, Marks, compared, summary
from twfs_tools.replay.options import (
    DEFAULT_POLICY,
    blocks_of,
    class_map,
    settings_with,
    tenant_map,
    tenants_made,
)
from twfs_tools.replay.streams import IntArray, Stream, block_tokens_for, make_stream
from twfs_tools.replay.traces import Session

CAPACITIES: Final = ("1%", "5%", "10%", "25%", "50%", "100%")
TOKEN_BYTES: Final = 327_680  # Llama-3-70B in bf16
LRU: Final = "exact lru"
OPTIMUM: Final = "optimum"


@dataclass(frozen=True)
class Plan:
    """What is to be replayed, and how; sizes are modelled bytes unless they say otherwise."""

    sessions: list[Session]
    names: list[str]  # of the traces, for people
    windows_s: list[float] = field(default_factory=lambda: [3600.0])
    seeds: list[int] = field(default_factory=lambda: [1])
    capacities: list[str] = field(default_factory=lambda: list(CAPACITIES))
    policies: list[str] = field(default_factory=lambda: [DEFAULT_POLICY])
    block_tokens: int | None = None
    token_bytes: int = TOKEN_BYTES
    payload_bytes: int | None = 4096  # of a block on the device; None: as modelled
    share_prefixes: bool = False
    front_bytes: int = 0
    touch: bool = True
    hints: drive.Hints = drive.Hints.ANSWER
    classes: list[str] = field(default_factory=list)
    tenants: int = 0
    tenant_map: list[str] = field(default_factory=list)
    quotas: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    config: bytes = b""
    read_part: float = 0.0
    durability: Durability = Durability.STRICT
    directory: Path = Path("/var/tmp")
    warehouse: bool = True  # False: only the marks
    advise: list[str] = field(default_factory=list)  # what each run's record is to predict

    @property
    def replays(self) -> int:
        """Requests that will go through warehouses."""
        each = sum(len(session.requests) for session in self.sessions)
        count = len(self.windows_s) * len(self.seeds) * len(self.capacities) * len(self.policies)
        return each * count if self.warehouse else 0

    def settings(self) -> Figures:
        """What was asked for, for the report."""
        return {
            "names": self.names, "windows_s": self.windows_s, "seeds": self.seeds,
            "capacities": self.capacities, "policies": self.policies,
            "block_tokens": block_tokens_for(self.sessions, self.block_tokens),
            "token_bytes": self.token_bytes, "payload_bytes": self.payload_bytes,
            "share_prefixes": self.share_prefixes, "front_bytes": self.front_bytes,
            "touch": self.touch, "hints": str(self.hints), "classes": self.classes,
            "tenants": self.tenants, "tenant_map": self.tenant_map, "quotas": self.quotas,
            "weights": self.weights, "config": self.config.decode(), "read_part": self.read_part,
            "durability": str(self.durability), "directory": str(self.directory),
            "advise": self.advise,
        }  # fmt: skip


def run(plan: Plan, advance: Callable[[int], None]) -> dict[str, Any]:
    """Do all of *plan*; the document that `twfs replay --json` prints."""
    # Before hours of work: what is wrong with the settings is said at once.
    configs = [settings_with(plan.config, CONFIG_FILE, policy) for policy in plan.policies]
    class_map(plan.classes)
    streams: list[Figures] = []
    runs: list[Figures] = []
    for window_s in plan.windows_s:
        for seed in plan.seeds:
            stream = make_stream(
                plan.sessions, window_s=window_s, seed=seed, block_tokens=plan.block_tokens,
                share_prefixes=plan.share_prefixes,
                tenant_of=tenant_map(plan.sessions, plan.tenants, plan.tenant_map),
            )  # fmt: skip
            marks = Marks(stream, bounds.ceiling(stream), window_s, seed, plan.token_bytes)
            streams.append(marks.described())
            capacities = [
                blocks_of(text, stream.unique_blocks, marks.block_bytes) for text in plan.capacities
            ]
            runs += _bounds(marks, capacities)
            if plan.warehouse:
                for policy, config in zip(plan.policies, configs, strict=True):
                    for setup in _setups(plan, marks, capacities, config):
                        outcome = drive.replay(
                            stream, setup, plan.directory, _front(stream, setup), advance
                        )
                        runs.append(marks.replayed(policy, setup, outcome))
    compared(runs)
    return {
        "replay": "twfs", "environment": environment(plan.directory), "settings": plan.settings(),
        "streams": streams, "summary": summary(runs), "runs": runs,
    }  # fmt: skip


def _bounds(marks: Marks, capacities: list[int]) -> list[Figures]:
    """The exact LRU and the optimum at each of *capacities*."""
    uses = bounds.next_uses(marks.stream)
    lru = bounds.lru(marks.stream, capacities)
    return [
        marks.bound(LRU, capacity, hits) for capacity, hits in zip(capacities, lru, strict=True)
    ] + [
        marks.bound(OPTIMUM, capacity, bounds.optimum(marks.stream, capacity, uses))
        for capacity in capacities
    ]


def _front(stream: Stream, setup: drive.Setup) -> IntArray:
    """Blocks of each request that the engine's own memory holds; it sees every request."""
    return bounds.lru(stream, [setup.front_blocks])[0].blocks


def _setups(plan: Plan, marks: Marks, capacities: list[int], config: Any) -> Iterator[drive.Setup]:
    """One setup for each of *capacities*."""
    payload = marks.block_bytes if plan.payload_bytes is None else plan.payload_bytes
    for capacity in capacities:
        setup = drive.Setup(
            capacity, payload, config=config, hints=plan.hints,
            front_blocks=plan.front_bytes // marks.block_bytes, touch=plan.touch,
            read_part=plan.read_part, durability=plan.durability,
            class_of=class_map(plan.classes),
            advised_blocks=tuple(
                blocks_of(text, marks.stream.unique_blocks, marks.block_bytes)
                for text in plan.advise
            ),
        )  # fmt: skip
        quotas = {
            name: quota // marks.block_bytes * setup.unit_bytes
            for name, quota in plan.quotas.items()
        }
        prepare = tenants_made(marks.stream.tenants, quotas, plan.weights)
        yield replace(setup, prepare=prepare)
