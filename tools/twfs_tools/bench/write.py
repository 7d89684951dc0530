"""`twfs bench write`: durable puts of whole sessions beside fio with an fsync, and small blocks.

A put is timed from the call to its answer: copied, checksummed twice, written, flushed, published.
"""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.client import Client
from twfs_tools.bench import fio
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
    contiguous_run,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.bench.workers import Publisher, publish_together
from twfs_tools.output import JsonFlag, parse_size

BLOCK_BYTES: Final = (2 << 20, 8 << 20, 32 << 20)
QUICK_BLOCK_BYTES: Final = (2 << 20,)
SMALL_BYTES: Final = 64 << 10
SMALL_BLOCKS: Final = 32  # of one put: a turn of a few hundred tokens
CLIENTS: Final = (1, 4)


def write(
    directory: DirectoryOption = Path("/var/tmp"),
    device: DeviceOption = None,
    rounds: RoundsOption = 5,
    wanted: Annotated[str, typer.Option("--bytes", help="Payload of one session.")] = "512M",
    puts: Annotated[int, typer.Option("--puts", help="Puts per client of small blocks.")] = 40,
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Store sessions of 2, 8 and 32 MiB blocks beside fio; blocks of 64 KiB by 1 and 4 clients."""
    total = 8 << 20 if quick else parse_size(wanted)
    rounds, puts = (1, 2) if quick else (rounds, puts)
    small = SMALL_BYTES * SMALL_BLOCKS * puts * sum(CLIENTS) * rounds
    results = []
    with scratch(directory, int(1.1 * (total * (rounds + 1) + small)), device=device) as made:
        made.start()
        client = made.connect()
        try:
            for block_bytes in QUICK_BLOCK_BYTES if quick else BLOCK_BYTES:
                one = _one_size(made, client, block_bytes, total, rounds, device=device)
                results.append(one)
            results += [_small(made, clients, puts, rounds) for clients in CLIENTS]
        finally:
            client.close()
    settings = {
        "bytes": total, "rounds": rounds, "puts_per_client": puts, "blocks_per_put": SMALL_BLOCKS,
        "fio_engine": fio.engine(), "fio_huge_pages": True, "fio_end_fsync": True,
        "target_ratio_to_fio": 0.8,
    }  # fmt: skip
    finish("write", directory, settings, results, as_json=as_json)


def _one_size(
    made: Scratch, client: Client, block_bytes: int, total: int, rounds: int, *, device: Path | None
) -> dict[str, Any]:
    """Measure one block size; its sessions are removed behind."""
    blocks = max(2, total // block_bytes)
    model = client.open_model(f"write-{block_bytes}", opaque_layout(block_bytes))
    payloads = random_payloads(blocks, block_bytes)
    heads = [random_names(model, blocks) for _ in range(rounds + 1)]
    require_stored(client.put(model, heads[-1], payloads))  # brings the arena's memory in
    offset, extent_bytes, count = contiguous_run(client, model, heads[-1])
    if device is not None:  # nothing lies there any more, and no file can stand beside it
        client.remove(model.id, heads[-1].hash_at(blocks - 1))
    left = iter(heads)

    def put() -> float:
        names = next(left)
        began = time.perf_counter()
        result = client.put(model, names, payloads)
        took = time.perf_counter() - began
        require_stored(result)
        return took

    def rival() -> float:
        if device is not None:
            return fio.seconds(fio.Run(device, offset, extent_bytes, count, write=True))
        beside = made.root / "fio.img"
        try:
            return fio.seconds(fio.Run(beside, 0, extent_bytes, count, write=True))
        finally:
            beside.unlink(missing_ok=True)

    runs = interleave(rounds, {"put": put, "fio": rival}, f"storing blocks of {block_bytes} bytes")
    for names in heads[: rounds if device is not None else rounds + 1]:
        client.remove(model.id, names.hash_at(blocks - 1))
    seconds = {name: median(each) for name, each in runs.items()}
    return {
        "block_bytes": block_bytes,
        "blocks": blocks,
        "put_GB_s": blocks * block_bytes / seconds["put"] / GIGABYTE,
        "fio_GB_s": blocks * block_bytes / seconds["fio"] / GIGABYTE,
        "ratio_to_fio": seconds["fio"] / seconds["put"],
        "rounds": runs,
    }


def _small(made: Scratch, clients: int, puts: int, rounds: int) -> dict[str, Any]:
    """Measure how many small blocks *clients* processes publish per second."""
    rates = interleave(
        rounds, {"rate": partial(_small_round, made, clients, puts)}, f"{clients} clients storing"
    )["rate"]
    return {
        "small_block_bytes": SMALL_BYTES,
        "clients": clients,
        "blocks_per_put": SMALL_BLOCKS,
        "blocks_per_s": median(rates),
        "rounds": rates,
    }


def _small_round(made: Scratch, clients: int, puts: int) -> float:
    """Let *clients* processes put at once; blocks published per second by all of them."""
    done = publish_together(Publisher(made.socket, SMALL_BYTES, SMALL_BLOCKS, puts), clients)
    return clients * puts * SMALL_BLOCKS / done.seconds
