"""`twfs bench read`: the host reader beside fio on the same extents and the mount.

Matching, reading and verifying through a client are all timed; the daemon is a process of its own.
"""

import resource
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
from twfs.readers import host as host_reader
from twfs.store import Model
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
    drop_page_cache,
    opaque_layout,
    random_names,
    random_payloads,
    require_stored,
    scratch,
)
from twfs_tools.output import JsonFlag, parse_size, working

BLOCK_BYTES: Final = (64 << 10, 2 << 20, 8 << 20, 32 << 20)
QUICK_BLOCK_BYTES: Final = (64 << 10, 2 << 20)
BLOCKS_MAX: Final = 4096  # of a session: small blocks would make 16,384 of 1 GiB
MOUNT_READ_BYTES: Final = 1 << 20  # what the kernel asks FUSE for at most


def read(
    directory: DirectoryOption = Path("/var/tmp"),
    device: DeviceOption = None,
    rounds: RoundsOption = 5,
    wanted: Annotated[str, typer.Option("--bytes", help="Payload of one session.")] = "1G",
    *,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Read sessions of 64 KiB, 2, 8 and 32 MiB blocks: host reader, fio, mount."""
    total = 8 << 20 if quick else parse_size(wanted)
    sizes = QUICK_BLOCK_BYTES if quick else BLOCK_BYTES
    rounds = 1 if quick else rounds
    mounted = Path("/dev/fuse").exists()
    results = []
    with scratch(directory, int(total * 1.1) * len(sizes), device=device) as made:
        made.start(mount=mounted)
        client = made.connect()
        try:
            for block_bytes in sizes:
                one = _one_size(made, client, block_bytes, total, rounds, mounted=mounted)
                results.append(one)
        finally:
            client.close()
    settings = {
        "bytes": total, "rounds": rounds, "fio_engine": fio.engine(), "fio_huge_pages": True,
        "in_flight_bytes": fio.IN_FLIGHT_BYTES, "target_ratio_to_fio": 0.95,
        "target_verification_cost": 0.10,
    }  # fmt: skip
    finish("read", directory, settings, results, as_json=as_json)


def _one_size(
    made: Scratch, client: Client, block_bytes: int, total: int, rounds: int, *, mounted: bool
) -> dict[str, Any]:
    """Measure one block size."""
    blocks = min(max(2, total // block_bytes), BLOCKS_MAX)
    payload_bytes = blocks * block_bytes
    model = client.open_model(f"read-{block_bytes}", opaque_layout(block_bytes))
    names = random_names(model, blocks)
    with working(f"storing {blocks} blocks of {block_bytes} bytes"):
        require_stored(client.put(model, names, random_payloads(blocks, block_bytes)))
    offset, extent_bytes, count = contiguous_run(client, model, names)
    rival = fio.Run(made.device, offset, extent_bytes, count)
    arena = Arena.private(payload_bytes)
    try:
        host = partial(_host, client, model, names, arena, block_bytes)
        host()  # brings the destination's memory in, as an engine's is
        cases: dict[str, Callable[[], tuple[float, float]]] = {
            "host": host,
            "unverified": partial(_unverified, host),
            "fio": lambda: (fio.seconds(rival), 0.0),
        }
        if mounted:
            folder = made.mountpoint / model.name / names.hash_at(blocks - 1).hex()
            cases["mount"] = partial(_mount, folder)
        runs = interleave(rounds, cases, f"reading blocks of {block_bytes} bytes")
    finally:
        arena.close()
    seconds = {name: median([took for took, _ in each]) for name, each in runs.items()}
    return {
        "block_bytes": block_bytes,
        "blocks": blocks,
        "host_GB_s": payload_bytes / seconds["host"] / GIGABYTE,
        "fio_GB_s": payload_bytes / seconds["fio"] / GIGABYTE,
        "ratio_to_fio": seconds["fio"] / seconds["host"],
        "unverified_GB_s": payload_bytes / seconds["unverified"] / GIGABYTE,
        "verification_cost": 1 - seconds["unverified"] / seconds["host"],
        "cpu_us_per_block": median([cpu for _, cpu in runs["host"]]) * 1e6 / blocks,
        "mount_GB_s": payload_bytes / seconds["mount"] / GIGABYTE if mounted else None,
        "times_mount": seconds["mount"] / seconds["host"] if mounted else None,
        "rounds": {name: [took for took, _ in each] for name, each in runs.items()},
    }


def _host(
    client: Client, model: Model, names: Names, arena: Arena, block_bytes: int
) -> tuple[float, float]:
    """Match, read and verify the whole session; (seconds, CPU seconds of this process)."""
    destinations = [
        arena.view[at * block_bytes : (at + 1) * block_bytes] for at in range(len(names))
    ]
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    with client.match(model, names) as found:
        report = found.read_into(destinations) if found.blocks else None
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    if report is None or report.blocks != len(names):
        outcome = "no match" if report is None else report.outcomes[report.blocks].value
        raise DeviceError(f"a session just stored could not be read whole: {outcome}")
    return took, (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


class _AnySum(bytes):
    """A checksum that equals every other."""

    __slots__ = ()

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = bytes.__hash__


class _NoHashing:
    """In the host reader's place for xxhash: what reading would take without verification."""

    @staticmethod
    def xxh3_128_digest(_: object) -> bytes:
        """Return what passes for the checksum of anything."""
        return _AnySum()


def _unverified(read_it: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Run *read_it* without verification, which the library itself has no way to switch off."""
    module = vars(host_reader)
    real = module["xxhash"]
    module["xxhash"] = _NoHashing
    try:
        return read_it()
    finally:
        module["xxhash"] = real


def _mount(folder: Path) -> tuple[float, float]:
    """Read every block of the session's directory with a cold page cache."""
    drop_page_cache()
    buffer = bytearray(MOUNT_READ_BYTES)
    began = time.perf_counter()
    for path in sorted(folder.glob("*.kv")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began, 0.0
