"""`twfs bench commit`: what strict durability costs beside relaxed, in commits, puts and latency.

Expected before it was first run: twice the commits, since relaxed syncs once and strict twice; 1.3
to 1.5 times the puts of one client, since the flush of the device stays as it is.
"""

import time
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from twfs.client import Client
from twfs.store import Durability, Retention
from twfs.units import ModelId, PrefixHash
from twfs_tools.bench.report import (
    DirectoryOption,
    QuickFlag,
    RoundsOption,
    finish,
    interleave,
    median,
    percentile,
)
from twfs_tools.bench.scratch import (
    Scratch,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.bench.workers import Published, Publisher, publish_together
from twfs_tools.output import JsonFlag

SMALL_BYTES: Final = 64 << 10
CLIENTS: Final = (1, 4)
EXPECTED_COMMITS: Final = 2.0  # ratio of relaxed to strict
EXPECTED_PUTS: Final = (1.3, 1.5)  # of one client


def commit(
    directory: DirectoryOption = Path("/var/tmp"),
    rounds: RoundsOption = 7,
    puts: Annotated[int, typer.Option("--puts", help="Puts per client, and commits.")] = 100,
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare durability strict and relaxed: bare commits, and puts of one small block."""
    rounds, puts = (1, 3) if quick else (rounds, puts)
    results = []
    room = SMALL_BYTES * 2 * puts * sum(CLIENTS) * rounds
    with ExitStack() as stack:
        served: dict[str, Scratch] = {}
        for durability in Durability:
            served[durability] = stack.enter_context(scratch(directory, room))
            served[durability].start(durability=durability)
        results.append(_commits(served, puts, rounds))
        results += [_puts(served, clients, puts, rounds) for clients in CLIENTS]
    settings = {
        "rounds": rounds, "puts_per_client": puts, "block_bytes": SMALL_BYTES,
        "blocks_per_put": 1, "expected_commit_ratio": EXPECTED_COMMITS,
        "expected_put_ratio_1_client": EXPECTED_PUTS,
    }  # fmt: skip
    finish("commit", directory, settings, results, as_json=as_json)


def _commits(served: dict[str, Scratch], commits: int, rounds: int) -> dict[str, Any]:
    """Commit one small change after the other, without a device: the class of one block."""
    with ExitStack() as stack:
        cases = {
            name: partial(_commit_round, *_one_session(stack, made), commits)
            for name, made in served.items()
        }
        rates = interleave(rounds, cases, "committing")
    medians = {name: median(each) for name, each in rates.items()}
    return {
        "of": "commits",
        **{f"{name}_per_s": value for name, value in medians.items()},
        "ratio": medians["relaxed"] / medians["strict"],
        "rounds": rates,
    }


def _one_session(stack: ExitStack, made: Scratch) -> tuple[Client, ModelId, PrefixHash]:
    """A client, and a session of one block."""
    client = stack.enter_context(made.connect())
    model = client.open_model("commits", opaque_layout(SMALL_BYTES))
    names = random_names(model, 1)
    require_stored(client.put(model, names, random_payloads(1, SMALL_BYTES)))
    return client, model.id, names.hash_at(0)


def _commit_round(client: Client, model: ModelId, head: PrefixHash, commits: int) -> float:
    """Commits per second."""
    classes = cycle((Retention.DURABLE, Retention.STANDARD))  # each is a change
    began = time.perf_counter()
    for _ in range(commits):
        client.set_retention(model, head, next(classes))
    return commits / (time.perf_counter() - began)


def _puts(served: dict[str, Scratch], clients: int, puts: int, rounds: int) -> dict[str, Any]:
    """Let *clients* processes put one small block at a time: rate, and latency of a put."""
    runs = interleave(
        rounds,
        {
            name: partial(_put_round, made, clients, puts) for name, made in served.items()
        },
        f"{clients} clients storing",
    )  # fmt: skip
    rates = {
        name: [clients * puts / each.seconds for each in of_one] for name, of_one in runs.items()
    }
    delays = {
        name: [1000 * percentile(each.latencies, 50) for each in of_one]
        for name, of_one in runs.items()
    }
    figures: dict[str, Any] = {"of": "puts", "clients": clients}
    for name in served:
        figures[f"{name}_per_s"] = median(rates[name])
        figures[f"{name}_p50_ms"] = median(delays[name])
    figures["ratio"] = figures["relaxed_per_s"] / figures["strict_per_s"]
    return {**figures, "rounds": {"per_s": rates, "p50_ms": delays}}


def _put_round(made: Scratch, clients: int, puts: int) -> Published:
    return publish_together(Publisher(made.socket, SMALL_BYTES, 1, puts), clients)
