"""Small traces in the public formats, made up, and where the public ones lie on this machine."""

import json
import os
import random
from pathlib import Path
from typing import Any, Final

import pytest

TRACES: Final = os.environ.get("TWFS_TRACES", "")
needs_traces: Final = pytest.mark.skipif(
    not TRACES, reason="TWFS_TRACES names no folder with kv-cache-tester/ and mooncake/"
)


def agents() -> Path:
    """Where the public sessions of coding agents lie."""
    return Path(TRACES) / "kv-cache-tester"


def conversations() -> Path:
    """Where Mooncake's conversation trace lies."""
    return Path(TRACES) / "mooncake" / "conversation_trace.jsonl"


def request(at_s: float, ids: list[int], tokens: int | None = None, **more: Any) -> dict[str, Any]:
    """One request as kv-cache-tester records it; *tokens* of the prompt, by default whole ids."""
    return {
        "t": at_s, "type": "n", "model": "m", "in": 64 * len(ids) if tokens is None else tokens,
        "out": 5, "hash_ids": ids, "input_types": ["text"], "output_types": ["text"],
        "stop": "tool_use", "think_time": 1.5,
    } | more  # fmt: skip


def write_session(folder: Path, name: str, requests: list[dict[str, Any]], **more: Any) -> Path:
    """Write a session file with ids of 64 tokens."""
    path = folder / f"{name}.json"
    file = {
        "id": name, "models": ["m"], "block_size": 64, "hash_id_scope": "local",
        "tool_tokens": 0, "system_tokens": 0, "requests": requests,
    }  # fmt: skip
    path.write_text(json.dumps(file | more))
    return path


def write_mooncake(folder: Path, rows: list[tuple[int, list[int], int]]) -> Path:
    """Write a Mooncake trace of (timestamp in ms, ids of 512 tokens, prompt tokens)."""
    path = folder / "conversation.jsonl"
    lines = [
        {"timestamp": at, "input_length": tokens, "output_length": 7, "hash_ids": ids}
        for at, ids, tokens in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_agents(folder: Path, *, sessions: int, turns: int, seed: int = 0) -> None:
    """Write sessions that mostly grow by a few blocks a turn, as those of agents do.

    Now and then one begins anew behind its first part, as after a compaction.
    """
    drawn = random.Random(seed)
    for number in range(sessions):
        ids = list(range(1, 4 * drawn.randint(2, 6) + 1))
        top, at_s = len(ids), 0.0
        requests = []
        for turn in range(turns):
            requests.append(
                request(
                    at_s, list(ids), 64 * len(ids) + drawn.randint(0, 63),
                    stop="end_turn" if turn % 5 == 4 else "tool_use",
                )
            )  # fmt: skip
            if drawn.random() < 0.1:
                del ids[len(ids) // 2 :]
            grown = drawn.randint(1, 12)
            ids += range(top + 1, top + grown + 1)
            top += grown
            at_s += drawn.choice([2.0, 5.0, 20.0, 300.0])
        write_session(folder, f"trace_{number:04d}", requests)
