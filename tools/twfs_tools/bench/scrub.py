"""`twfs bench scrub`: what a pass of the scrubber costs a client that reads all the while.

The same session is read again and again with the scrubber off, at its default rate, and without a
limit; the last shows what the rate spares. The daemon is a process of its own.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.client import Client
from twfs.devices.arena import Arena
from twfs.errors import DeviceError
from twfs.prefix import Names
from twfs.store import Model
from twfs_tools.bench.report import (
    GIGABYTE,
    DeviceOption,
    DirectoryOption,
    QuickFlag,
    RoundsOption,
    finish,
    interleave,
    median,
)
from twfs_tools.bench.scratch import (
    Scratch,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.output import JsonFlag, parse_size, working

BLOCK_BYTES: Final = (64 << 10, 2 << 20, 8 << 20)
QUICK_BLOCK_BYTES: Final = (64 << 10,)
BLOCKS_MAX: Final = 4096  # of the session that is read
CASE_SECONDS: Final = 3.0  # of reading in one round: more than the scrubber needs to give way
QUICK_CASE_SECONDS: Final = 0.2
FILLERS: Final = 3  # sessions beside it: a pass must not end within a round
RATES: Final[dict[str, int | None]] = {"default": None, "unlimited": 0}


def scrub(
    directory: DirectoryOption = Path("/var/tmp"),
    device: DeviceOption = None,
    rounds: RoundsOption = 9,
    wanted: Annotated[str, typer.Option("--bytes", help="Payload of one session.")] = "1G",
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read sessions of 64 KiB, 2 and 8 MiB blocks with the scrubber off and on."""
    total = 16 << 20 if quick else parse_size(wanted)
    rounds = 1 if quick else rounds
    seconds = QUICK_CASE_SECONDS if quick else CASE_SECONDS
    results = []
    for block_bytes in QUICK_BLOCK_BYTES if quick else BLOCK_BYTES:
        # A warehouse for each size: the scrubber reads blocks of the same size as the client.
        blocks = min(max(2, total // block_bytes), BLOCKS_MAX)
        room = int(1.1 * (1 + FILLERS) * blocks * (block_bytes + 4096))
        with scratch(directory, room, device=device) as made:
            made.start()
            results.append(_one_size(made, block_bytes, blocks, rounds, seconds))
    settings = {
        "bytes": total, "rounds": rounds, "case_seconds": seconds,
        "target_loss_percent_default": 5.0,
    }  # fmt: skip
    finish("scrub", directory, settings, results, as_json=as_json)


def _one_size(
    made: Scratch, block_bytes: int, blocks: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Measure one block size."""
    payload_bytes = blocks * block_bytes
    client = made.connect()
    arena = Arena.private(payload_bytes)
    try:
        model = client.open_model("scrubbed", opaque_layout(block_bytes))
        names = random_names(model, blocks)
        payloads = random_payloads(blocks, block_bytes)
        with working(f"storing {1 + FILLERS} x {blocks} blocks of {block_bytes} bytes"):
            for each in (names, *(random_names(model, blocks) for _ in range(FILLERS))):
                require_stored(client.put(model, each, payloads))
        del payloads
        into = [arena.view[at * block_bytes : (at + 1) * block_bytes] for at in range(blocks)]
        reading = partial(_reading, client, model, names, into, seconds)
        reading()  # brings the destination's memory in, as an engine's is
        cases: dict[str, Callable[[], tuple[float, float]]] = {"off": reading}
        for name, rate in RATES.items():
            cases[name] = partial(_scrubbed, client, rate, reading)
        runs = interleave(rounds, cases, f"reading blocks of {block_bytes} bytes")
    finally:
        arena.close()
        client.close()
    rates = {name: median([rate for rate, _ in each]) for name, each in runs.items()}
    scrub_rates = {name: median([rate for _, rate in each]) for name, each in runs.items()}
    pairs = zip(runs["off"], runs["default"], strict=True)
    return {
        "block_bytes": block_bytes,
        "blocks": blocks,
        "read_GB_s_off": rates["off"] / GIGABYTE,
        "read_GB_s_default": rates["default"] / GIGABYTE,
        "read_GB_s_unlimited": rates["unlimited"] / GIGABYTE,
        "loss_percent_default": 100 * (1 - rates["default"] / rates["off"]),
        "loss_percent_of_pairs": median([100 * (1 - on[0] / off[0]) for off, on in pairs]),
        "loss_percent_unlimited": 100 * (1 - rates["unlimited"] / rates["off"]),
        "scrub_GB_s_default": scrub_rates["default"] / GIGABYTE,
        "scrub_GB_s_unlimited": scrub_rates["unlimited"] / GIGABYTE,
        "rounds": {name: [rate for rate, _ in each] for name, each in runs.items()},
    }


def _reading(
    client: Client, model: Model, names: Names, destinations: list[memoryview], seconds: float
) -> tuple[float, float]:
    """Match, read and verify the session for *seconds*; bytes per second, and 0."""
    began, done, took = time.perf_counter(), 0, 0.0
    while took < seconds:
        with client.match(model, names) as found:
            report = found.read_into(destinations) if found.blocks else None
        if report is None or report.blocks != len(names):
            raise DeviceError("a session just stored could not be read whole")
        done += sum(view.nbytes for view in destinations)
        took = time.perf_counter() - began
    return done / took, 0.0


def _scrubbed(
    client: Client, rate: int | None, reading: Callable[[], tuple[float, float]]
) -> tuple[float, float]:
    """Read beside a pass; bytes per second of the reader, and of the scrubber meanwhile."""
    client.operate("scrub-start", rate_bytes_s=rate, whole=True)
    began = time.perf_counter()
    read, _ = reading()
    took = time.perf_counter() - began
    status = client.operate("scrub-status")  # a stop forgets what of a batch was read
    client.operate("scrub-stop")
    if rate is None and status["state"] == "idle":
        raise DeviceError("the pass ended within the round: use more --bytes")
    if status["bad_blocks"]:
        raise DeviceError("the scrubber found bad blocks: this machine's memory or disk errs")
    return read, status["read_bytes"] / took
