"""What metadata that may be damaged still says: asked by a process that may die of it.

LMDB maps its file, and follows what is written there: a damaged one may end the process. So
`salvage` starts `python -m twfs.recovery.salvaging`, which says the little that a rebuild can use,
and then reads everything.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from twfs.errors import CorruptMetadata, TwfsError
from twfs.metadata.environment import peek
from twfs.metadata.tables import LENGTH, RETIRED, DeviceRecord, ReadView, unpack_devices
from twfs.records import FORMAT_VERSION, Block, BlockKey, Extent
from twfs.units import ByteCount, ByteOffset, DeviceIndex

SECONDS_MIN: Final = 60.0  # a damaged tree may go round for ever
BYTES_PER_SECOND: Final = 4 << 20  # of the file, at the least, where nothing is wrong
COUNTERS: Final = ("generation", "ino", "model")


@dataclass(frozen=True, slots=True)
class Salvage:
    """What was learnt; none of it is proved."""

    warehouse: UUID
    secret: bytes
    sequence: int  # of the roster that it agrees with
    devices: tuple[DeviceRecord, ...]
    counters: dict[str, int]
    retired: tuple[Extent, ...]  # of lost bytes: never to be used again
    whole: bool  # every record of every table could be read


def salvage(directory: Path) -> Salvage | None:
    """Return what the metadata in *directory*, locked by the caller, says; None if nothing."""
    path = directory / "data.mdb"
    if not path.exists():
        return None
    home = str(Path(__file__).parents[1])
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "twfs.recovery.salvaging", str(directory)]
    seconds = SECONDS_MIN + path.stat().st_size / BYTES_PER_SECOND
    try:
        answer = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, check=False, timeout=seconds,
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired as error:
        answer = error.stdout or b""
    first, _, second = answer.partition(b"\n")
    try:
        said = json.loads(first)
        return Salvage(
            UUID(said["warehouse"]), bytes.fromhex(said["secret"]), int(said["sequence"]),
            tuple(unpack_devices(said["devices"].encode())),
            {name: int(said["counters"][name]) for name in COUNTERS},
            tuple(
                Extent(DeviceIndex(device), ByteOffset(offset), ByteCount(length))
                for device, offset, length in said["retired"]
            ),
            second == b"whole\n",
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, CorruptMetadata):
        return None


def _basics(view: ReadView) -> dict[str, Any]:
    """What Salvage has, ready for JSON."""
    version = LENGTH.unpack(view.meta("format_version") or bytes(8))[0]
    if version != FORMAT_VERSION:
        raise CorruptMetadata(f"format version {version}")
    return {
        "warehouse": str(UUID(bytes=view.meta("warehouse") or b"")),
        "secret": (view.meta("secret") or b"").hex(),
        "sequence": LENGTH.unpack(view.meta("roster") or bytes(8))[0],
        "devices": (view.meta("devices") or b"").decode(),
        "counters": {name: view.counter(name) for name in COUNTERS},
        "retired": [
            (extent.device, extent.offset, extent.length)
            for extent, why in view.all_limbo()
            if why == RETIRED
        ],
    }


def _read_all(view: ReadView) -> None:
    """Read every record; raises at one that cannot be."""
    for key, value in view.all_blocks():
        BlockKey.unpack(key)
        Block.unpack(value)
    for key, _ in view.all_children():
        BlockKey.unpack(key)
    for walk in (view.all_heads(), view.models(), view.runs("free")):
        for _ in walk:
            pass


def main(directory: Path) -> None:
    """Say the basics in one line, and in another, after reading everything, that all is whole."""
    with peek(directory) as view:
        sys.stdout.write(json.dumps(_basics(view)) + "\n")
        sys.stdout.flush()  # what follows may be the end of this process
        _read_all(view)
        sys.stdout.write("whole\n")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (TwfsError, ValueError, OSError):
        sys.exit(1)
