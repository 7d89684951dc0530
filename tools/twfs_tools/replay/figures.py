"""Figures of a replay: hit rates and what they cost, of the whole stream and of its parts."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from twfs_tools.replay.bounds import Hits
from twfs_tools.replay.drive import Outcome, Setup
from twfs_tools.replay.streams import IntArray, Stream

Figures = dict[str, Any]
SPREAD_KEYS: Final = ("hit_rate", "of_ceiling", "amplification", "written_per_unique")


@dataclass(frozen=True)
class Marks:
    """One stream, what an infinite store would hit of it, and what a block stands for."""

    stream: Stream
    ceiling: IntArray  # blocks of each request
    window_s: float
    seed: int
    token_bytes: int

    @property
    def block_bytes(self) -> int:
        """KV of one block, as modelled."""
        return self.token_bytes * self.stream.block_tokens

    def described(self) -> Figures:
        """The stream in numbers."""
        stream = self.stream
        return {
            "window_s": self.window_s,
            "seed": self.seed,
            "requests": len(stream),
            "sessions": len(stream.sessions),
            "models": len(stream.models),
            "span_s": float(stream.at_ms[-1]) / 1000,
            "prompt_tokens": int(stream.prompt_tokens.sum()),
            "asked_blocks": len(stream.blocks),
            "unique_blocks": stream.unique_blocks,
            "unique_bytes": stream.unique_blocks * self.block_bytes,
            "ceiling": self.rate(self.ceiling),
        }

    def rate(self, hits: IntArray, where: "IntArray | slice" = slice(None)) -> float:
        """Tokens of *hits* blocks to the tokens of all prompts; of the requests *where*."""
        asked = int(self.stream.prompt_tokens[where].sum())
        return self.stream.block_tokens * int(hits[where].sum()) / asked if asked else 0.0

    def part(self, hits: IntArray, where: "IntArray | slice" = slice(None)) -> Figures:
        """Hit rate, its part of the ceiling, and the tokens missed to those that had to be."""
        rate, ceiling = self.rate(hits, where), self.rate(self.ceiling, where)
        return {
            "hit_rate": rate,
            "of_ceiling": rate / ceiling if ceiling else 1.0,
            "amplification": (1 - rate) / (1 - ceiling) if ceiling < 1 else 1.0,
            "ceiling": ceiling,
        }

    def _written(self, blocks: int) -> Figures:
        return {
            "written_blocks": blocks,
            "written_bytes": blocks * self.block_bytes,
            "written_per_unique": blocks / self.stream.unique_blocks,
        }

    def _run(self, policy: str, capacity: int) -> Figures:
        return {
            "policy": policy,
            "window_s": self.window_s,
            "seed": self.seed,
            "capacity_part": capacity / self.stream.unique_blocks,
            "capacity_blocks": capacity,
            "capacity_bytes": capacity * self.block_bytes,
        }

    def bound(self, policy: str, capacity: int, hits: Hits) -> Figures:
        """A mark that was computed, not replayed."""
        return {
            **self._run(policy, capacity), "replayed": False, **self.part(hits.blocks),
            **self._written(hits.written_blocks),
        }  # fmt: skip

    def replayed(self, policy: str, setup: Setup, outcome: Outcome) -> Figures:
        """What a replay through the warehouse gave."""
        stream, front = self.stream, outcome.front
        lengths = stream.lengths()
        asked, published = int((lengths - front).sum()), int(outcome.published.sum())
        busy_s = outcome.match_s + outcome.put_s + outcome.touch_s
        return {
            **self._run(policy, setup.capacity_blocks), "replayed": True, **self.part(outcome.hits),
            **self._written(published),
            "hints": str(setup.hints),
            "front_blocks": setup.front_blocks,
            "front_touch": setup.touch,
            "front_hit_rate": self.rate(front),
            "store_hit_rate": int((outcome.hits - front).sum()) / asked if asked else 0.0,
            "refused_blocks": int(outcome.refused.sum()),
            "evicted_blocks": outcome.evicted_blocks,
            "physical_block_bytes": outcome.unit_bytes,
            "physical_capacity_bytes": outcome.total_bytes,
            "physical_written_bytes": published * outcome.unit_bytes,
            "physical_used_bytes": outcome.used_bytes,
            "metadata_bytes": outcome.metadata_bytes,
            "read_blocks": outcome.read_blocks,
            "lookups_per_s": asked / outcome.match_s if outcome.match_s else 0.0,
            "publishes_per_s": published / outcome.put_s if outcome.put_s else 0.0,
            "requests_per_s": len(stream) / outcome.wall_s,
            "wall_s": outcome.wall_s, "cpu_s": outcome.cpu_s, "busy_s": busy_s,
            "publishes_per_cpu_s": published / outcome.cpu_s,
            "peak_memory_bytes": outcome.peak_bytes,
            "findings": outcome.findings,
            "counters": outcome.statistics["counters"],
            "tenants": self._by(stream.tenants, stream.tenant, outcome),
            "classes": self._by(*self._classes(setup), outcome),
            "advised": self._advised(setup, outcome),
        }  # fmt: skip

    def _advised(self, setup: Setup, outcome: Outcome) -> list[Figures]:
        """What the run's own access record predicts for other capacities; see `compared`."""
        if not setup.advised_blocks:
            return []
        whole = len(self.stream.blocks) * self.stream.block_tokens
        scale = whole / int(self.stream.prompt_tokens.sum())  # the record knows whole blocks only
        by_bytes = {each["bytes"]: each["hit_rate"] for each in outcome.advice["curve"]}
        return [
            {
                "capacity_part": blocks / self.stream.unique_blocks, "capacity_blocks": blocks,
                "policy": outcome.advice["policy"],
                "hit_rate": scale * by_bytes[blocks * setup.unit_bytes],
                "replayed_hit_rate": None, "off_by": None,
                "block_part": outcome.advice["block_part"],
                "session_bytes": self._session_bytes(setup, outcome),
            }
            for blocks in setup.advised_blocks
        ]  # fmt: skip

    def _session_bytes(self, setup: Setup, outcome: Outcome) -> float | None:
        """Modelled bytes that a live session needs, as its record says."""
        sessions = outcome.advice["sessions"]
        if sessions is None:
            return None
        return float(sessions["needed_bytes"]) / setup.unit_bytes * self.block_bytes

    def _classes(self, setup: Setup) -> tuple[list[str], IntArray]:
        """The classes that sessions asked for, and of which one each request is."""
        of_session = [str(setup.class_of(name) or "standard") for name in self.stream.sessions]
        names = sorted(set(of_session))
        numbers = np.array([names.index(name) for name in of_session], np.int64)
        return names, numbers[self.stream.session]

    def _by(self, names: Sequence[str], of_request: IntArray, outcome: Outcome) -> list[Figures]:
        """The same of each part of the requests; nothing where there is only one part."""
        if len(names) < 2:
            return []
        found = []
        for number, name in enumerate(names):
            where = np.flatnonzero(of_request == number)
            published = int(outcome.published[where].sum())
            found.append({
                "name": name, "requests": len(where), **self.part(outcome.hits, where),
                "written_blocks": published, "written_bytes": published * self.block_bytes,
                "refused_blocks": int(outcome.refused[where].sum()),
            })  # fmt: skip
        return found


def compared(runs: Iterable[Mapping[str, Any]]) -> None:
    """Say of each prediction how far it is off the run of that policy and capacity, if one was."""

    def key(run: Mapping[str, Any], capacity: int) -> tuple[Any, ...]:
        return run["policy"], run["window_s"], run["seed"], capacity

    replayed = [run for run in runs if run["replayed"]]
    truth = {key(run, run["capacity_blocks"]): run["hit_rate"] for run in replayed}
    for run in replayed:
        for each in run["advised"]:
            rate = each["replayed_hit_rate"] = truth.get(key(run, each["capacity_blocks"]))
            each["off_by"] = None if rate is None else each["hit_rate"] - rate


def summary(runs: Iterable[Mapping[str, Any]]) -> list[Figures]:
    """Mean, least, most and standard deviation over the seeds, by policy, window and capacity."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        what = (run["policy"], run["window_s"], round(run["capacity_part"], 4))
        alike.setdefault(what, []).append(run)
    found = []
    for (policy, window_s, part), group in alike.items():
        row: Figures = {
            "policy": policy, "window_s": window_s, "capacity_part": part,
            "capacity_bytes": group[0]["capacity_bytes"], "replayed": group[0]["replayed"],
            "seeds": [run["seed"] for run in group],
        }  # fmt: skip
        for key in SPREAD_KEYS:
            values = [run[key] for run in group]
            row[key] = statistics.fmean(values)
            row[f"{key}_min"], row[f"{key}_max"] = min(values), max(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append(row)
    return found
