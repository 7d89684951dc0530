"""What must be true of a warehouse after a power cut, looked at in a process that may die of it.

Damaged metadata can be a SIGBUS; so the warehouse is opened in a child, which lives as long as
nothing kills it. It says what is wrong in words; nothing said means nothing found.
"""

import multiprocessing
import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

from support.cutworkload import LAYOUTS, Session
from support.warehouses import chain_of, put_whole, read_all, records_of
from twfs.errors import TwfsError
from twfs.records import BlockKey
from twfs.store import Model
from twfs.warehouse import Warehouse

NEW_SEED: Final = 1000  # a chain that no workload puts
NEW_BLOCKS: Final = 3
ASKED_SESSIONS: Final = 24  # of each image; the checker looks at all that is there
READ_SESSIONS: Final = 4  # of those, the ones whose bytes are compared, as an engine reads them
ANSWER_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Expected:
    """What a cut may leave: at least the blocks *must*, at most the blocks *may* (packed keys)."""

    directory: Path
    must: frozenset[bytes]
    may: frozenset[bytes]
    sessions: tuple[Session, ...]  # all there ever are, those first that were put last
    durability: str | None
    seed: int
    goes_on: bool  # put something new as well


def complaints(expected: Expected) -> list[str]:
    """Open the warehouse and look; what is wrong, in words."""
    options: dict[str, Any] = {}
    if expected.durability:
        options["durability"] = expected.durability
    try:
        with Warehouse.open(expected.directory, **options) as warehouse:
            found = _held(warehouse, expected)
            found += _sessions(warehouse, expected)
            if expected.goes_on:
                model = warehouse.open_model("wide")
                names = chain_of(model, NEW_BLOCKS, NEW_SEED)
                put_whole(warehouse, model, names)
                read_all(warehouse, model, names)
            found += [str(finding) for finding in warehouse.check(data=True).findings]
            return found
    except (TwfsError, AssertionError) as error:
        return [f"{type(error).__name__}: {error}"]


def _held(warehouse: Warehouse, expected: Expected) -> list[str]:
    """Compare the records with what must and what may be there."""
    there = {key.pack() for key in records_of(warehouse._core)}
    lost, unknown = expected.must - there, there - expected.may
    found = [f"{len(lost)} blocks are lost: {min(lost).hex()} ..."] if lost else []
    return found + ([f"{len(unknown)} were never published: {min(unknown).hex()} ..."]
                    if unknown else [])  # fmt: skip


def _sessions(warehouse: Warehouse, expected: Expected) -> list[str]:
    """Ask for some sessions and read some of them, those that were put last in any case."""
    known = {info.name for info in warehouse.models()}
    models = {name: warehouse.open_model(name) for name in LAYOUTS if name in known}
    asked = [session for session in expected.sessions if session.model in models]
    chance = random.Random(expected.seed)
    newest, others = asked[: ASKED_SESSIONS // 2], asked[ASKED_SESSIONS // 2 :]
    asked = newest + chance.sample(others, min(len(others), ASKED_SESSIONS // 2))
    found = []
    for session in asked:
        model = models[session.model]
        got = warehouse.lookup(model, names := session.names(model))
        low = _leading(model, names.hashes, expected.must)
        high = _leading(model, names.hashes, expected.may)
        if not low <= got <= high:
            found.append(f"{got} blocks of {session} are found, not {low} to {high}")
    for session in [*newest[:2], *chance.sample(asked, min(len(asked), READ_SESSIONS - 2))]:
        model = models[session.model]
        try:
            read_all(warehouse, model, session.names(model))
        except AssertionError as error:
            found.append(f"{session} is held but is not read as it was put: {error!r}")
    return found


def _leading(model: Model, hashes: bytes, keys: frozenset[bytes]) -> int:
    """How many leading blocks of a chain are in *keys*, all shards of them."""
    count = len(hashes) // 16
    for index in range(count):
        name = hashes[16 * index : 16 * index + 16]
        for shard in range(model.layout.shards):
            if BlockKey(model.id, name, 0, shard).pack() not in keys:  # type: ignore[arg-type]
                return index
    return count


def _serve(pipe: Connection) -> None:
    """The child: look at one warehouse after the other."""
    while True:
        try:
            expected = pipe.recv()
        except EOFError:
            return
        pipe.send(complaints(expected))


class Verifier:
    """A child that looks at warehouses, replaced when it dies."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._child = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()

    def complaints(self, expected: Expected) -> list[str]:
        """What is wrong with a warehouse; the death or the silence of the child is, too."""
        try:
            self._pipe.send(expected)
            if self._pipe.poll(ANSWER_S):
                found: list[str] = self._pipe.recv()
                return found
            what = f"no answer in {ANSWER_S:.0f} s"
        except (EOFError, BrokenPipeError):
            self._child.join()
            what = f"it died with {self._child.exitcode}"
        self.close()
        self._start()
        return [f"the process that opened it: {what}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._child.kill()
        self._child.join()
