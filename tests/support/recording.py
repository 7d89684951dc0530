"""Access records made by hand: names, a clock that stands, and notes of matches."""

from pathlib import Path
from typing import Final

import xxhash

from support.warehouses import MHA
from twfs.config import RecordSettings
from twfs.policy.accesses import Kind
from twfs.policy.recording import Recorder
from twfs.units import ModelId

SECRET: Final = b"s" * 32
MODEL: Final = ModelId(1)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now_ms


def names_of(start: int, stop: int, salt: str = "") -> bytes:
    return b"".join(xxhash.xxh3_128_digest(f"{salt}{at}".encode()) for at in range(start, stop))


def recorder(directory: Path, clock: Clock, *, size: int = 1 << 22, days: int = 7) -> Recorder:
    return Recorder(directory, RecordSettings(bytes=size, days=days), clock, SECRET)


def match(
    record: Recorder, hashes: bytes, *, start: int = 0, stop: int = 0, tenant: int = 0
) -> None:
    record.note(Kind.MATCH, MODEL, MHA, hashes, tenant=tenant, retention=1, start=start, stop=stop)
