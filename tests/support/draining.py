"""Processes for the tests of drains: one that drains by turns for ever, and one that reads.

`python -m support.draining drain DIRECTORY` empties one device, then the other, block by block, and
prints a line whenever a drain begins. `python -m support.draining read SOCKET BLOCKS SEED...` reads
the chains of these seeds through a client until its standard input ends, compares every byte, and
prints what it found as JSON.
"""

import json
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from support.mounting import until
from support.warehouses import chain_of, payload_of
from twfs.admin import moving
from twfs.client import connect
from twfs.store import ReadOutcome
from twfs.warehouse import Warehouse

PATIENT_S: Final = 20.0


def drain_for_ever(directory: Path, report: Callable[[int], None]) -> None:
    """Empty devices 0 and 1 by turns; every batch is one block, so that kills find many places.

    *report* gets the number of a device whose drain has begun.
    """
    moving.BATCH_BLOCKS_MAX = 1  # type: ignore[misc]
    with Warehouse.open(directory) as warehouse:
        for index in warehouse.devices:
            warehouse.operate("device-online", device=index)
        while True:
            for index in sorted(warehouse.devices):
                warehouse.operate("device-drain", device=index, rate_bytes_s=1 << 40)
                report(index)

                def done(index: int = index) -> bool:
                    rows = warehouse.operate("device-list")
                    return bool(rows[index]["drain"]["done"])

                until(done, "the drain ends")
                warehouse.operate("device-online", device=index)


def read_for_ever(socket: Path, blocks: int, seeds: list[int]) -> dict[str, int]:
    """Read until standard input ends; counts of reads, misses, wrong bytes and devices seen."""
    found = {"reads": 0, "misses": 0, "wrong": 0, "devices": 0}
    seen: set[int] = set()
    with connect(
        socket, arena_bytes=0, connect_timeout_s=PATIENT_S, match_timeout_s=PATIENT_S
    ) as client:
        model = client.open_model("m")
        while not select.select([sys.stdin], [], [], 0)[0]:
            if found["reads"] == 0:
                sys.stdout.write("reading\n")
                sys.stdout.flush()
            for seed in seeds:
                names = chain_of(model, blocks, seed)
                with client.match(model, names) as match:
                    found["misses"] += blocks - match.blocks
                    if not match.blocks:
                        continue
                    into = [
                        np.zeros(model.layout.block_bytes(), np.uint8) for _ in range(match.blocks)
                    ]
                    outcomes = match.read_into(into).outcomes
                    seen |= {int(number) for number in match._extents["device"]}
                for index, outcome in enumerate(outcomes):
                    found["reads"] += 1
                    if outcome is not ReadOutcome.HIT:
                        found["misses"] += 1
                    elif not np.array_equal(
                        into[index], payload_of(model.layout, names.hash_at(index))
                    ):
                        found["wrong"] += 1
    return {**found, "devices": len(seen)}


def say(index: int) -> None:
    """Print that the drain of a device has begun."""
    sys.stdout.write(f"{index}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "drain":
        drain_for_ever(Path(sys.argv[2]), say)
    else:
        given = read_for_ever(Path(sys.argv[2]), int(sys.argv[3]), list(map(int, sys.argv[4:])))
        sys.stdout.write(json.dumps(given) + "\n")
