"""One client process of the stress run: engines in threads that share a client, until SIGTERM.

`python -m support.stressclient JSON` is that process; JSON is a Task. See stressrecord for what it
leaves behind.
"""

import faulthandler
import json
import random
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.stressengine import Engine
from support.stressrecord import Record, Reported
from twfs.client import Client, connect
from twfs.errors import NoDaemon
from twfs.store import Model

ARENA_BYTES: Final = 8 << 20
FLUSH_SECONDS: Final = 0.5
THREADS: Final = 2
PAUSE_SECONDS: Final = 0.05  # before another attempt to connect


@dataclass(frozen=True, slots=True)
class Task:
    """What the parent tells a client."""

    directory: str
    records: str
    seed: int
    number: int  # of the place among the clients that run at once
    life: int  # which process of all
    clients: int
    wrong_every: int = 0  # every so many-th put stores a wrong byte, to show that it is seen


def run_engine(
    task: Task, number: int, *, client: Client, record: Record, models: dict[str, Model],
    stop: threading.Event,
) -> None:  # fmt: skip
    """Be one engine until *stop*; whatever a step raises was written down by Record.call."""
    engine = Engine(
        client, record, models, stop,
        rng=random.Random(f"{task.seed} {task.life} {number}"),
        tokens=Path(task.records).parent / "tokens", name=f"{task.number}-{number}",
        engines=task.clients * THREADS, wrong_every=task.wrong_every,
    )  # fmt: skip
    while not stop.is_set():
        try:
            engine.step()
        except Reported:
            continue
        except Exception as error:  # noqa: BLE001 - an error of the engine's own
            record.broken("engine", error=repr(error), trace=traceback.format_exc(limit=-6))
    engine.end()


def connected(task: Task, record: Record, stop: threading.Event) -> Client | None:
    """Connect, as often as it takes; None when told to stop before."""
    path = Path(task.directory) / "socket"
    while not stop.is_set():
        client = record.call("connect", lambda: connect(path, arena_bytes=ARENA_BYTES), NoDaemon)
        if client is not None:
            return client
        stop.wait(PAUSE_SECONDS)
    return None


def main(task: Task) -> None:
    """Run until SIGTERM."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # says where a stuck one is
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    record = Record(Path(task.records) / f"{task.life}.json")
    client = connected(task, record, stop)
    if client is None:
        record.flush(None)
        return
    models: dict[str, Model] = {}
    threads = [
        threading.Thread(
            target=run_engine,
            args=(task, number),
            kwargs={"client": client, "record": record, "models": models, "stop": stop},
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    while not stop.wait(FLUSH_SECONDS):
        record.flush(client)
    for thread in threads:
        thread.join()
    record.call("close", client.close)
    record.flush(client)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
