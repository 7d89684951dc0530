"""`twfs bench match`: how long a 122,880-token prompt takes to be found, and what a block costs.

Hashing the prompt and the round trip to the daemon are timed apart.
"""

import time
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from twfs.client import Client
from twfs.errors import DeviceError
from twfs.store import Model
from twfs_tools.bench.report import DirectoryOption, QuickFlag, finish, median, percentile
from twfs_tools.bench.scratch import (
    TOKEN_LIMIT,
    Scratch,
    forget,
    opaque_layout,
    random_names,
    require_stored,
    scratch,
)
from twfs_tools.bench.workers import load
from twfs_tools.output import JsonFlag, Steps

PROMPT_TOKENS: Final = 122_880  # the mean of an agent's request
BLOCK_TOKENS: Final = (256, 16)
PAYLOAD_BYTES: Final = 4096  # the smallest: only the metadata is measured
DEVICE_BYTES: Final = 8192  # of such a block, with its header
PUT_BLOCKS: Final = 1920  # of one put while building
SIZES: Final = (100_000, 1_000_000)


def match(
    directory: DirectoryOption = Path("/var/tmp"),
    sizes: Annotated[
        list[int] | None, typer.Option("--blocks", help="Blocks in the warehouse; repeatable.")
    ] = None,
    matches: Annotated[int, typer.Option("--matches", min=1, help="Matches per case.")] = 200,
    *,
    busy: Annotated[
        bool, typer.Option("--busy", help="Also while tar reads the mount and a client puts.")
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also after the metadata left the page cache.")
    ] = False,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Match 122,880-token prompts, 256 and 16 tokens per block, among 100,000 and 1,000,000."""
    wanted = [15_360] if quick else list(sizes or SIZES)
    matches = 5 if quick else matches
    results: list[dict[str, Any]] = []
    for blocks in wanted:
        busy_bytes = (4 << 30) if busy and not quick else (64 << 20)
        with scratch(directory, blocks * DEVICE_BYTES + busy_bytes) as made:
            results += _one_warehouse(made, blocks, matches, busy=busy, cold=cold)
    settings = {
        "prompt_tokens": PROMPT_TOKENS, "matches": matches, "payload_bytes": PAYLOAD_BYTES,
        "busy": busy, "cold": cold,
    }  # fmt: skip
    finish("match", directory, settings, results, as_json=as_json)


def _one_warehouse(
    made: Scratch, blocks: int, matches: int, *, busy: bool, cold: bool
) -> list[dict[str, Any]]:
    """Build a warehouse of *blocks* blocks and measure it in every state asked for."""
    sessions = {
        step: max(1, blocks // len(BLOCK_TOKENS) * step // PROMPT_TOKENS) for step in BLOCK_TOKENS
    }
    results = [_build(made, sessions)]
    built = results[0]["blocks"]
    mounted = busy and Path("/dev/fuse").exists()
    began = time.perf_counter()
    made.start(mount=mounted)
    results[0]["daemon_start_s"] = time.perf_counter() - began
    results += [
        _matches(made, built, "warm", step=step, sessions=sessions[step], count=matches)
        for step in BLOCK_TOKENS
    ]
    results.append(_memory(made, built))
    if busy:
        with load(made.socket, made.mountpoint / "match-256" if mounted else None):
            results += [
                _matches(made, built, "busy", step=step, sessions=sessions[step], count=matches)
                for step in BLOCK_TOKENS
            ]
    if cold:
        made.stop()
        forget(made.directory)
        made.start()
        results += [
            _matches(made, built, "cold", step=step, sessions=sessions[step], count=matches)
            for step in BLOCK_TOKENS
        ]
    return results


def _build(made: Scratch, sessions: dict[int, int]) -> dict[str, Any]:
    """Fill the warehouse through the real put, without a daemon between."""
    payload = np.random.default_rng().bytes(PAYLOAD_BYTES)
    total, began = 0, time.perf_counter()
    store = made.open_in_process()
    try:
        for step, count in sessions.items():
            model = store.open_model(f"match-{step}", opaque_layout(PAYLOAD_BYTES, step))
            length = PROMPT_TOKENS // step
            with Steps(f"building, {step} tokens per block", count * length) as steps:
                for seed in range(count):
                    names = random_names(model, length, seed + 1)
                    for at in range(0, length, PUT_BLOCKS):
                        part = names.slice(at, min(length, at + PUT_BLOCKS))
                        require_stored(store.put(model, part, [payload] * len(part)))
                        total += len(part)
                        steps.advance(len(part))
    finally:
        store.close()
    took = time.perf_counter() - began
    return {"blocks": total, "build_s": took, "built_blocks_per_s": total / took}


def _matches(
    made: Scratch, blocks: int, state: str, *, step: int, sessions: int, count: int
) -> dict[str, Any]:
    """Match *count* prompts of sessions spread over the whole warehouse."""
    client = made.connect()
    try:
        model = client.open_model(f"match-{step}")
        hashing: list[float] = []
        round_trip: list[float] = []
        lookups: list[float] = []
        with Steps(f"matching, {step} tokens per block", count) as steps:
            for number in range(count):
                seed = 1 + number * 7919 % sessions
                times = _one_match(client, model, seed)
                for list_of, seconds in zip((hashing, round_trip, lookups), times, strict=True):
                    list_of.append(seconds * 1000)
                steps.advance()
    finally:
        client.close()
    return {
        "blocks": blocks,
        "state": state,
        "block_tokens": step,
        "prompt_blocks": PROMPT_TOKENS // step,
        "hash_ms_p50": median(hashing),
        "match_ms_first": round_trip[0],
        "match_ms_p50": median(round_trip),
        "match_ms_p99": percentile(round_trip, 99),
        "lookup_ms_p50": median(lookups),
        "lookup_ms_p99": percentile(lookups, 99),
    }


def _one_match(client: Client, model: Model, seed: int) -> tuple[float, float, float]:
    """Return the seconds of hashing one prompt, of matching it and of looking it up."""
    tokens = np.random.default_rng(seed).integers(0, TOKEN_LIMIT, PROMPT_TOKENS, np.uint32)
    at = [time.perf_counter()]
    names = model.chain().extend(tokens).names()
    at.append(time.perf_counter())
    found = client.match(model, names)
    at.append(time.perf_counter())
    try:
        if found.blocks != len(names):
            raise DeviceError(
                f"a session just stored matches {found.blocks} of {len(names)} blocks"
            )
    finally:
        found.release()
    before = time.perf_counter()
    client.lookup(model, names)
    return at[1] - at[0], at[2] - at[1], time.perf_counter() - before


def _memory(made: Scratch, blocks: int) -> dict[str, Any]:
    """Return the daemon's memory and the metadata's size, per block too."""
    assert made.daemon is not None
    status = Path(f"/proc/{made.daemon.pid}/status").read_text().splitlines()
    fields = {line.partition(":")[0]: line.split()[1] for line in status if line.endswith("kB")}
    metadata = sum(
        each.stat().st_blocks * 512
        for each in (made.directory / "meta").rglob("*")
        if each.is_file()
    )
    anonymous = int(fields["RssAnon"]) * 1024
    return {
        "blocks": blocks,
        "daemon_rss_bytes": int(fields["VmRSS"]) * 1024,
        "daemon_private_bytes": anonymous,
        "private_bytes_per_block": anonymous / blocks,
        "metadata_bytes_per_block": metadata / blocks,
    }
