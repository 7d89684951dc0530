"""Writers that are killed, and what must be true of a warehouse after one.

`python -m support.crashing DIRECTORY SEED TURNS` is such a writer: it prints what is durable.
"""

import random
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from support.warehouses import (
    MHA,
    assert_memory_agrees,
    chain_of,
    open_warehouse,
    payload_of,
    put,
    read_all,
    records_of,
)
from twfs.records import Block, BlockKey
from twfs.store import Model
from twfs.warehouse import Warehouse

FOREVER: Final = 1 << 30
# A report: "put" or "gone", seed, fork and blocks of a chain (see chain_of; fork -1 is none).
Report = tuple[str, int, int, int]
# What a block keeps for life; a rebuild gives its model another number.
Name = tuple[bytes, int, int]


def write(directory: Path, seed: int, turns: int, report: Callable[[Report], None]) -> None:
    """Put chains and branches, remove some; *report* what is durable, and what is to be removed."""
    chance = random.Random(seed)
    warehouse = Warehouse.open(directory)
    model = warehouse.open_model("m", MHA)
    for _ in range(turns):
        own, fork = chance.randrange(1, 40), chance.choice([-1, 0, 2, 5])
        blocks = max(fork, 0) + chance.randrange(1, 9)
        names = chain_of(model, blocks, own, fork=None if fork < 0 else fork)
        if chance.random() < 0.2 and names.hash_at(blocks - 1) in warehouse.heads(model.id):
            report(("gone", own, fork, blocks))
            warehouse.remove(model.id, names.hash_at(blocks - 1))
        else:
            assert put(warehouse, model, names).held == blocks
            report(("put", own, fork, blocks))
    warehouse.close()


def received(pipe: Connection) -> list[Report]:
    """What a dead writer had reported."""
    reports = []
    try:
        while pipe.poll():
            reports.append(pipe.recv())
    except EOFError:
        pass
    return reports


class Survivor:
    """What outlives all crashes of one warehouse: reports, and every generation ever seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.durable: set[Report] = set()
        self.lives: dict[int, Name] = {}
        self.inos: dict[int, Name] = {}

    def note(self, reports: list[Report]) -> None:
        """Take what a writer has reported, in its order."""
        for kind, own, fork, blocks in reports:
            if kind == "put":
                self.durable.add((kind, own, fork, blocks))
            else:  # whatever shares blocks with it may be shorter now
                self.durable = {r for r in self.durable if not self._touch(r, (own, fork))}

    @staticmethod
    def _touch(report: Report, other: tuple[int, int]) -> bool:
        """Tell whether two chains have blocks in common; -1 and 0 fork nowhere."""
        if report[2] > 0 and other[1] > 0:
            return True
        return (report[1], max(report[2], 0)) == (other[0], max(other[1], 0))

    def verify(self) -> None:
        """Open the warehouse; fail unless all that was reported is there and nothing is wrong."""
        with open_warehouse(self.directory) as warehouse:
            assert_memory_agrees(warehouse._core)  # nothing is reserved, nothing in limbo
            model = warehouse.open_model("m", MHA)
            for _, own, fork, blocks in self.durable:
                names = chain_of(model, blocks, own, fork=None if fork < 0 else fork)
                assert read_all(warehouse, model, names) == blocks
            for key, block in records_of(warehouse._core).items():
                self._compare(warehouse, model, key, block)
            assert warehouse.space().limbo_bytes == 0
            mine, _ = warehouse._core.take_numbers(1)
            assert mine[0] not in self.lives
            assert all(mine[0] > generation for generation in self.lives)

    def _compare(self, warehouse: Warehouse, model: Model, key: BlockKey, block: Block) -> None:
        """Whatever is there, reported or not, has the bytes of its name and a life of its own."""
        if block.generation not in self.lives:  # else the checker has proved it to be unchanged
            payload = warehouse.read_block(warehouse.block_info(key))
            assert bytes(payload) == payload_of(model.layout, key.prefix_hash).tobytes()
        name = (key.prefix_hash, key.group, key.shard)
        assert self.lives.setdefault(block.generation, name) == name
        assert self.inos.setdefault(block.ino, name) == name


def main(directory: str, seed: str, turns: str) -> None:
    """Be a writer, and print what it reports."""

    def report(what: Report) -> None:
        sys.stdout.write(" ".join(map(str, what)) + "\n")
        sys.stdout.flush()

    write(Path(directory), int(seed), int(turns), report)


if __name__ == "__main__":
    main(*sys.argv[1:])
