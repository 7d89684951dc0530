"""Time to choose 1 % of 3,000,000 blocks for eviction, and how long the lock is held meanwhile.

`python tests/bench/choosing.py [BLOCKS]`: sessions of 300 blocks in a real warehouse's arrays, half
of them with hints, by each policy. CPU time, so that a busy machine hardly counts. Nothing is
removed: what is measured is the choice, in the pieces in which evictions take it.
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from twfs.core.state import Core
from twfs.devices.formatting import DEVICE_BYTES_MIN, DeviceSpec
from twfs.eviction.choosing import victims
from twfs.eviction.evicting import VICTIMS_PER_COMMIT
from twfs.index.slots import LIVE, NONE
from twfs.policy.scoring import policy_of
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

CHAIN = 300  # blocks of a session


def fill(core: Core, count: int) -> None:
    """Enter *count* blocks as sessions of CHAIN each into the arrays alone."""
    slots, random = core.slots, np.random.default_rng(0)
    slots.allot(count)
    here = np.arange(count)
    first = here % CHAIN == 0
    slots.state[:count] = LIVE
    slots.parent[:count] = np.where(first, NONE, here - 1)
    slots.children[:count] = (here % CHAIN != CHAIN - 1) & (here != count - 1)
    slots.position[:count] = (here % CHAIN + 1) * 256
    slots.units[:count] = 3
    sessions = -(-count // CHAIN)
    ages = np.exp(random.uniform(0, 20, sessions)).astype(np.uint64)
    slots.stamp[:count] = core.clock() - ages[here // CHAIN]
    slots.stop[:count] = random.integers(0, 4, sessions, np.uint8)[here // CHAIN]
    for _ in range(1000):
        slots.uses.heard(slots.uses.new(), core.clock() - int(random.integers(1, 10**8)))
    slots.session[:count] = random.integers(0, 1001, sessions)[here // CHAIN]


def choose(core: Core, count: int) -> tuple[float, list[float]]:
    """Choose *count* blocks; CPU seconds in all, and of every time that the lock was held."""
    pieces = []
    chosen = victims(core, count * 3 * 4096)
    slots = []
    while True:
        begun = time.thread_time()
        with core.lock:
            some = list(islice(chosen, VICTIMS_PER_COMMIT))
            keys = [core.slots.key_of(slot) for slot in some]
        pieces.append(time.thread_time() - begun)
        slots += some
        if len(keys) < VICTIMS_PER_COMMIT:
            break
    assert len(slots) == count
    core.slots.state[slots] = LIVE
    return sum(pieces), pieces


def main(count: int) -> None:
    """Print the figures of each policy."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        Warehouse.create(root / "w", [DeviceSpec(root / "d.img", ByteCount(DEVICE_BYTES_MIN))])
        with Warehouse.open(root / "w") as warehouse:
            core = warehouse._core
            fill(core, count)
            for name in ("lru", "reuse"):
                core.policy = policy_of(name)
                runs = [choose(core, count // 100) for _ in range(5)]
                total = sorted(total for total, _ in runs)[2]
                longest = sorted(max(pieces) for _, pieces in runs)[2]
                later = sorted(max(pieces[1:], default=0.0) for _, pieces in runs)[2]
                sys.stdout.write(
                    f"{name}: {count // 100:,} of {count:,} in {1000 * total:.0f} ms of CPU; lock "
                    f"held for {1000 * longest:.0f} ms at first, then {1000 * later:.0f} ms\n"
                )
            core.slots.state[:count] = 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blocks", type=int, nargs="?", default=3_000_000)
    main(parser.parse_args().blocks)
