"""Cut the power of real block devices, as often as told, and look what is left.

    python tests/crash/disk_powercuts.py --images 10000 --seed 1

For every seed a workload process (support.cutworkload) works on a real warehouse: two devices, and
an ext4 with the metadata, each a loop device over a disk that logs its writes (support.faultdisk),
all in one order. Then its log is replayed into crash images: after any record, all that each disk
had flushed, and any part of what it had not, torn at 512 bytes, in any order. The kernel recovers
the ext4, the warehouse is opened, and this must hold: every block that was durable before the cut
and not removed since is found with its bytes; nothing is found that was not published; the checker,
with data, finds nothing; and (one image in eight) it takes new blocks. With `--durability relaxed`
what the last turn did may be lost. `--broken` takes a writer that must be caught.

Prints one JSON document; the exit code is 0 if nothing is wrong (with `--broken`: if it is caught).
Needs root, /dev/fuse and loop devices. The long run, before a release:

    python tests/crash/disk_powercuts.py --images 10000 --seed $RANDOM
    python tests/crash/disk_powercuts.py --images 10000 --seed $RANDOM --durability relaxed

Each seed gives the same turns and the same choice of cuts, but not the same log: threads and kernel
order their writes differently. So `--keep` keeps the directory of a seed with a complaint.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

TESTS: Final = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support.cutimages import CrashImages, Cut  # noqa: E402
from support.cutverify import Expected, Verifier  # noqa: E402
from support.cutworkload import BROKEN, Mark, Session  # noqa: E402
from support.faultrules import Kind, Logged, Request, read_log  # noqa: E402
from support.faultydisks import (  # noqa: E402
    FaultyDisks,
    ext4_on,
    faults_reason,
    faulty_disks,
    mount_ext4,
    unmount,
)
from twfs.devices.formatting import DeviceSpec  # noqa: E402
from twfs.warehouse import Warehouse  # noqa: E402

DEVICE_BYTES: Final = 16 << 20  # the least a device may have
META_BYTES: Final = 16 << 20
META: Final = "meta"  # the disk with the ext4; the third
META_NUMBER: Final = 2
BLKFLSBUF: Final = 0x1261
TURNS: Final = 60  # of one workload
IMAGES_PER_SEED: Final = 400
GOES_ON_EVERY: Final = 8
COMPLAINTS_MAX: Final = 20  # that are shown


@dataclass(frozen=True, slots=True)
class Options:
    """What to try; see the module's docstring."""

    images: int
    seed: int
    turns: int = TURNS
    images_per_seed: int = IMAGES_PER_SEED
    durability: str | None = None
    broken: str | None = None


@dataclass(slots=True)
class Report:
    """What was tried and what came of it."""

    images: int = 0
    workloads: int = 0
    records: int = 0
    flushes: int = 0
    unflushed_writes: int = 0
    lost_writes: int = 0
    torn_writes: int = 0
    by_turn: dict[str, int] = field(default_factory=dict)
    bad_images: int = 0
    bad_seeds: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def count(self, cut: Cut, turn: str) -> None:
        """Count one image, made by *cut* in the midst of *turn*."""
        self.images += 1
        self.unflushed_writes += cut.unflushed
        self.lost_writes += cut.unflushed - cut.written
        self.torn_writes += cut.torn
        self.by_turn[turn] = self.by_turn.get(turn, 0) + 1

    def add(self, other: "Report") -> None:
        """Add what another seed gave."""
        for name in ("images", "workloads", "records", "flushes", "unflushed_writes",
                     "lost_writes", "torn_writes", "bad_images"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for turn, count in other.by_turn.items():
            self.by_turn[turn] = self.by_turn.get(turn, 0) + count
        self.bad_seeds += other.bad_seeds
        self.complaints += other.complaints


def record(disks: FaultyDisks, directory: Path, seed: int, options: Options) -> list[Logged]:
    """Let a workload write, and return the log of it."""
    with ext4_on(disks.loops[META], directory / "fs") as filesystem:
        home = filesystem / "warehouse"
        Warehouse.create(home, [DeviceSpec(disks.loops[name]) for name in ("device0", "device1")])
        command = [
            sys.executable, "-m", "support.cutworkload", str(home), str(disks.socket), str(seed),
            str(options.turns),
        ]  # fmt: skip
        for name in ("durability", "broken"):
            if getattr(options, name):
                command += [f"--{name}", getattr(options, name)]
        paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
        subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    disks.control.ask(Request(logging=False))
    return list(read_log(disks.log))


@contextmanager
def recovered(disks: FaultyDisks, directory: Path) -> Iterator[str | None]:
    """Mount the ext4 as after a power cut; gives what the kernel says if it will not."""
    device = disks.loops[META]
    with device.open("rb") as file:
        fcntl.ioctl(file, BLKFLSBUF)  # whatever the kernel still knows of the image before
    try:
        mount_ext4(device, directory / "fs")
    except OSError as error:
        yield str(error)
        return
    try:
        yield None
    finally:
        unmount(directory / "fs")


class Turns:
    """What the marks of a log say about every moment of it."""

    def __init__(self, log: list[Logged], *, relaxed: bool) -> None:
        self._relaxed = relaxed
        self._held: list[frozenset[bytes]] = [frozenset()]  # after turn n - 1
        self._ended: list[tuple[int, Mark]] = []
        self._sessions: list[tuple[int, Session]] = []
        self._within: list[tuple[int, Mark]] = []
        for number, each in enumerate(log):
            if each.kind is not Kind.MARK:
                continue
            mark = msgspec.json.decode(each.data, type=Mark)
            if mark.what == "within":
                self._within.append((number, mark))
                continue
            if mark.held is None or mark.what == "fill":
                self._sessions += [(number, session) for session in mark.sessions]
            if mark.held is not None:
                self._held.append(frozenset(map(bytes.fromhex, mark.held)))
                self._ended.append((number, mark))

    def moments(self, chance: random.Random, count: int, log: list[Logged]) -> list[int]:
        """Choose when to cut, in order: any time since the warehouse was filled.

        Half of them right behind a flush, when some disk has just been told to be safe.
        """
        first, last = self._ended[0][0] + 1, self._ended[-1][0] + 1
        flushes = [at + 1 for at in range(first, last) if log[at].kind is Kind.FLUSH]
        anywhere = chance.choices(range(first, last + 1), k=count - count // 2)
        return sorted(anywhere + chance.choices(flushes or [last], k=count // 2))

    def name_at(self, records: int) -> str:
        """What was being done after so many records."""
        return self._ended[min(self._done(records), len(self._ended) - 1)][1].what

    def sessions_by(self, records: int) -> tuple[Session, ...]:
        """All sessions there ever are: those begun by then, the newest first, then the others."""
        begun = [session for number, session in self._sessions if number < records]
        later = [session for number, session in self._sessions if number >= records]
        return tuple(dict.fromkeys([*begun[::-1], *later]))

    def _done(self, records: int) -> int:
        """How many turns had ended by then."""
        return sum(number < records for number, _ in self._ended)

    def expected(self, records: int) -> tuple[frozenset[bytes], frozenset[bytes]]:
        """Blocks that must, and that may be there after a cut behind so many records.

        Those durable before and behind the turn that is cut; relaxed, before the last one too. But
        what is taken out within them is missing until it is published again (relaxed: all along).
        """
        done = self._done(records)
        states = self._held[done - self._relaxed : done + 2]
        begun = self._ended[done - 1 - self._relaxed][0] if done > self._relaxed else -1
        away: set[str] = set()
        for number, mark in self._within:
            if begun < number < records:
                away |= set(mark.going)
                away -= set() if self._relaxed else set(mark.back)
        must = frozenset.intersection(*states) - frozenset(map(bytes.fromhex, away))
        return must, frozenset.union(*states)


def try_seed(directory: Path, seed: int, count: int, options: Options) -> Report:
    """Record one workload, and look at *count* crash images of it."""
    report = Report(workloads=1)
    sizes = {"device0": DEVICE_BYTES, "device1": DEVICE_BYTES, META: META_BYTES}
    with faulty_disks(directory, sizes, logging=True) as disks, Verifier() as verifier:
        log = record(disks, directory, seed, options)
        images = CrashImages(log, dict(enumerate(disks.images.values())))
        assert images.matches(), "the log does not make the disks: replay would prove nothing"
        turns = Turns(log, relaxed=options.durability == "relaxed")
        chance = random.Random(seed)
        spoilt: tuple[int, ...] = tuple(range(len(sizes)))
        report.records = len(log)
        report.flushes = sum(each.kind is Kind.FLUSH for each in log)
        for moment in turns.moments(chance, count, log):
            images.advance(moment)
            cut = images.cut(chance, spoilt=spoilt)
            goes_on = report.images % GOES_ON_EVERY == 0
            must, may = turns.expected(moment)
            with recovered(disks, directory) as refusal:
                found = [f"ext4: {refusal}"] if refusal else verifier.complaints(
                    Expected(
                        directory / "fs" / "warehouse", must, may, turns.sessions_by(moment),
                        options.durability, chance.randrange(1 << 32), goes_on,
                    )
                )  # fmt: skip
            spoilt = tuple(range(len(sizes))) if goes_on else (META_NUMBER,)
            report.count(cut, turns.name_at(moment))
            if found:
                report.bad_images += 1
                report.bad_seeds = [seed]
                report.complaints.append(f"seed {seed}, {cut}: {'; '.join(found[:3])}")
    return report


def try_all(directory: Path, options: Options, *, processes: int = 1, keep: bool = False) -> Report:
    """Try seed after seed until there were so many images, *processes* seeds at once."""
    report = Report()
    counts = [options.images_per_seed] * (options.images // options.images_per_seed)
    if options.images % options.images_per_seed:
        counts.append(options.images % options.images_per_seed)
    seeds = range(options.seed, options.seed + len(counts))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        bases = [directory / f"seed{seed}" for seed in seeds]
        tried = pool.map(try_seed, bases, seeds, counts, [options] * len(counts))
        for base, of_seed in zip(bases, tried, strict=True):
            report.add(of_seed)
            if not (keep and of_seed.bad_images):
                shutil.rmtree(base)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run; return 0 if all is well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--images-per-seed", type=int, default=IMAGES_PER_SEED)
    parser.add_argument("--durability", choices=["strict", "relaxed"])
    parser.add_argument("--broken", choices=BROKEN)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="seeds at once")
    parser.add_argument("--directory", type=Path, help="for scratch files: ext4 or xfs")
    parser.add_argument("--keep", action="store_true", help="the directory of a bad seed")
    given = vars(parser.parse_args(arguments))
    reason = faults_reason()
    if reason is not None:
        sys.exit(f"disk_powercuts: {reason}")
    keep, parent, processes = (given.pop(name) for name in ("keep", "directory", "processes"))
    options = Options(**given)
    base = Path(tempfile.mkdtemp(prefix="twfs-powercuts-", dir=parent))
    began = time.monotonic()
    report = try_all(base, options, processes=processes, keep=keep)
    seconds = time.monotonic() - began
    shown: dict[str, Any] = asdict(report)
    shown["complaints"] = report.complaints[:COMPLAINTS_MAX]
    figures = {"seconds": round(seconds, 1), "images_per_s": round(report.images / seconds, 1)}
    print(json.dumps({**asdict(options), **shown, **figures}, indent=1))  # noqa: T201
    if not any(base.iterdir()):
        base.rmdir()
    return 0 if bool(report.bad_images) is bool(options.broken) else 1


if __name__ == "__main__":
    sys.exit(main())
