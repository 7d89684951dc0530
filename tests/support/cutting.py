"""Rounds of power cuts: a load is recorded, and states that a cut may leave are opened and judged.

crash/powercuts.py is the command, and says what makes a state bad.
"""

import os
import random
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb.verify  # noqa: TID251
import pytest

from support.brokenwriters import BROKEN, BROKEN_FILES
from support.cutfiles import FilesLoad, sizes_of, small_pieces
from support.cutload import WIDE, CutLoad, shrink
from support.filing import make_file, tree_of
from support.powercut import Image, Recorder, Replay
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    chain_of,
    make_warehouse,
    put,
    read_all,
    records_of,
)
from twfs.checking import proving
from twfs.devices.device import Device
from twfs.errors import TwfsError
from twfs.records import BlockKey
from twfs.store import Durability
from twfs.warehouse import Warehouse

STEPS: Final = 60  # of one load: the tables are copied at each commit
IMAGES_PER_ROUND: Final = 120
BROKEN_PER_ROUND: Final = 40  # most are caught by then
GO_ON: Final = 1 / 6  # of the images are used, not only read
FIRST_MAX: Final = 5  # bad images described
NEVER_OFFERED: Final = 77_777  # a seed of no chain
MEMORY: Final = Path("/dev/shm")  # a drive is not needed: what it may do is played

Lives = Mapping[BlockKey, tuple[int, bool]]  # generation, and whether it is a hole


@dataclass(slots=True)
class Report:
    """What was tried, and what came of it."""

    seed: int
    durability: str
    broken: str | None
    files: bool = False
    images: int = 0
    bad: int = 0
    lost: int = 0  # of the bad ones: a publish was answered and is gone
    last_commit_lost: int = 0  # as relaxed may
    rounds: int = 0
    commits: int = 0
    published: int = 0  # blocks that were answered as published
    steps: int = 0  # changes of files that were answered
    seconds: float = 0.0
    first: list[str] = field(default_factory=list)


class Judge(ABC):
    """Makes crash states of one load in a directory of its own, and judges each."""

    def __init__(self, directory: Path, durability: Durability, patch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._durability = durability
        self._touched: list[tuple[str, int, int]] = []  # since the image: device, offset, length
        transfer = Device._transfer

        def noted(device: Device, call: Any, verb: str, *where: Any) -> None:
            _, views, offset = where
            if verb == "write":
                length = sum(view.nbytes for view in views)
                self._touched.append((device.path.name, offset, length))
            transfer(device, call, verb, *where)

        patch.setattr(Device, "_transfer", noted)
        patch.setattr(proving, "THREADS", 1)  # to start eight takes longer than all that they read

    def overwrite(self, device: str, offset: int, data: bytes) -> None:
        """Change a device of the copy."""
        with (self._directory / device).open("r+b", buffering=0) as opened:
            opened.seek(offset)
            opened.write(data)

    def judge(self, image: Image, replay: Replay, chance: random.Random, report: Report) -> None:
        """Open *image* and count it; the copy's devices are as before afterwards."""
        (self._directory / "meta" / "lock.mdb").unlink(missing_ok=True)
        tables = self._directory / "meta" / "data.mdb"
        tables.write_bytes(image.tables)
        self._touched = [(device, offset, len(data)) for device, offset, data in image.parts]
        for part in image.parts:
            self.overwrite(*part)
        try:
            complaints = [f"LMDB: {each}" for each in _verified(tables)] or self._open(
                image, chance, report
            )
        except (TwfsError, AssertionError) as error:
            complaints = [f"{type(error).__name__}: {error}"]
        for device, offset, length in self._touched:
            self.overwrite(device, offset, replay.durable(device, offset, length))
        report.images += 1
        if complaints:
            report.bad += 1
            if len(report.first) < FIRST_MAX:
                report.first.append(f"round {report.rounds}, {image.text}: {complaints[0]}")

    @abstractmethod
    def _open(self, image: Image, chance: random.Random, report: Report) -> list[str]:
        """What is wrong with the warehouse that opens after the cut."""


class Cutter(Judge):
    """Judges what a load of chains has left."""

    def __init__(
        self, directory: Path, load: CutLoad, durability: Durability, patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(directory, durability, patch)
        self._load = load

    def _open(self, image: Image, chance: random.Random, report: Report) -> list[str]:
        with Warehouse.open(self._directory, durability=self._durability) as warehouse:
            found = records_of(warehouse._core)
            lives = {key: (block.generation, block.hole) for key, block in found.items()}
            there = {(key, life) for key, (life, _) in lives.items()}
            complaints = []
            if lives not in image.allowed:
                complaints.append("the records are of no commit that may be the last")
            lost = image.promised - there
            if lost:
                report.lost += 1
                complaints.append(f"{len(lost)} published blocks are lost, {next(iter(lost))}")
            elif len(image.allowed) > 1 and lives == image.allowed[0]:
                newer = {
                    (key, life) for left in image.allowed[1:] for key, (life, _) in left.items()
                }
                report.last_commit_lost += bool(image.returned & newer - there)
            complaints += map(str, warehouse.check(data=True).findings)
            for key, block in found.items():
                if block.checksums.xxh3 != self._load.sums[key]:
                    complaints.append(f"{key} has the bytes of another name")
            with warehouse._core.metadata.read() as view:
                if view.counter("generation") <= image.generation:
                    complaints.append(f"generation {image.generation} would be given again")
                if view.counter("model") <= image.model:
                    complaints.append(f"model number {image.model} would be given again")
            if not complaints:
                self._match(warehouse, lives, chance)
            if not complaints and chance.random() < GO_ON:
                self._go_on(warehouse, chance)
                complaints += map(str, warehouse.check(data=True).findings)
        return complaints

    def _match(
        self,
        warehouse: Warehouse,
        lives: Mapping[BlockKey, tuple[int, bool]],
        chance: random.Random,
    ) -> None:
        """Read one chain as an engine does; AssertionError."""
        for name, layout in (("m", MHA), ("w", WIDE)):
            with suppress(TwfsError):
                model = warehouse.open_model(name)
                assert model.layout == layout
                never = chain_of(model, 2, NEVER_OFFERED)
                assert warehouse.lookup(model, never) == 0, "a name that nobody put is there"
                if model.id not in self._load.known:
                    continue
                names = chance.choice(self._load.known[model.id])
                wanted = 0
                while wanted < len(names):
                    if lives.get(BlockKey(model.id, names.hash_at(wanted)), (0, True))[1]:
                        break
                    wanted += 1
                assert read_all(warehouse, model, names) == wanted, "a match ends elsewhere"

    def _go_on(self, warehouse: Warehouse, chance: random.Random) -> None:
        """Use the warehouse that a cut has left: what it takes for free is written."""
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, chance.randrange(1, 20), chance.randrange(100, 200))
        held = put(warehouse, model, names).held
        assert held > 0, "nothing can be put any more"
        # Room is made in the background, and may take the end of this chain again.
        assert read_all(warehouse, model, names) <= held, "more is read than was put"


class FilesCutter(Judge):
    """Judges what a load of files has left."""

    def __init__(
        self, directory: Path, load: FilesLoad, durability: Durability, patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(directory, durability, patch)
        self._load = load
        small_pieces(patch)

    def _open(self, image: Image, chance: random.Random, report: Report) -> list[str]:  # noqa: ARG002
        with Warehouse.open(self._directory, durability=self._durability) as warehouse:
            files = warehouse.files
            found, complaints = tree_of(files), []
            since = image.since if self._durability is Durability.RELAXED else image.marked
            if found not in self._load.allowed(since, image.marked):
                complaints.append(f"{image.marked}: there are {sizes_of(found)}")
            complaints += map(str, warehouse.check(data=True).findings)
            if not complaints and chance.random() < GO_ON:
                make_file(files, 0, b"new", b"as it was")
                make_file(files, 0, b"newer", b"as it is")
                files.rename(0, b"newer", 0, b"new")
                if tree_of(files) != found | {b"/new": b"as it is"}:
                    complaints.append(f"the tree cannot be changed: {sizes_of(tree_of(files))}")
                complaints += map(str, warehouse.check(data=True).findings)
        return complaints


def _verified(tables: Path) -> list[str]:
    """What LMDB's offline checker says: it maps nothing, so it survives any file."""
    try:
        return list(lmdb.verify.verify(str(tables)))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]


def one_round(base: Path, seed: int, report: Report, images: int) -> None:
    """Record one load below *base*, and judge *images* of its states."""
    chance = random.Random(f"{report.seed} {seed}")
    live, copy = base / "live", base / "copy"
    durability = Durability(report.durability)
    make_warehouse(live, (DEVICE_BYTES, DEVICE_BYTES))
    shrink(live)
    shutil.copytree(live, copy)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        if report.broken is not None:
            (BROKEN_FILES if report.files else BROKEN)[report.broken](patch)
        load = (FilesLoad if report.files else CutLoad)(live, recorder, durability)
        if report.files:
            small_pieces(patch)
        load.run(chance, STEPS)
    replay = Replay(recorder, relaxed=durability is Durability.RELAXED)
    with pytest.MonkeyPatch.context() as patch:
        cutter = (
            FilesCutter(copy, load, durability, patch)
            if isinstance(load, FilesLoad)
            else Cutter(copy, load, durability, patch)
        )
        for each in replay.images(chance, images):
            if isinstance(each, Image):
                cutter.judge(each, replay, chance, report)
            else:
                for write in each:
                    cutter.overwrite(write.file.name, write.offset, write.data)
    report.rounds += 1
    report.commits += len(recorder.records) - 1
    report.published += replay.published()
    report.steps += replay.steps()
    shutil.rmtree(live)
    shutil.rmtree(copy)


def run(
    images: int, seed: int, durability: str = "strict", broken: str | None = None,
    directory: Path | None = None, *, files: bool = False,
) -> Report:  # fmt: skip
    """Try *images* states; with *broken* as far as to the first bad one."""
    report = Report(seed, durability, broken, files)
    began = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="twfs-cuts-", dir=directory or _in_memory()))
    try:
        while report.images < images and not (broken and report.bad):
            each = BROKEN_PER_ROUND if broken else IMAGES_PER_ROUND
            count = min(each, images - report.images)
            one_round(base, report.rounds, report, count)
    finally:
        shutil.rmtree(base)
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _in_memory() -> Path | None:
    """Where images need no drive, if O_DIRECT works there; else the default."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=MEMORY) as file:
        os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        return MEMORY
    return None
