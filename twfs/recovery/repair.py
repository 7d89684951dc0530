"""Repair of a warehouse that nobody has open: what is wrong is mended or let go, never guessed.

Verdicts per block come first; then all tables are made anew from the blocks that stay, and the
differences are written in one transaction: a repair that is killed before has changed no table.
Superblocks are mended before it and the roster after it; either may be done twice. Space is given
back only by that transaction. Blocks.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from twfs.checking import invariants
from twfs.checking.filecheck import complaints
from twfs.checking.snapshot import Snapshot, take_snapshot
from twfs.checking.subject import Subject, offline
from twfs.core.enrolling import roster_of
from twfs.devices.payload import aligned_buffer
from twfs.devices.roster import Roster, newest_roster, write_roster
from twfs.errors import CorruptMetadata, DeviceError
from twfs.metadata.tables import LENGTH, ModelRecord, WriteView
from twfs.records import Header, sealed_with
from twfs.recovery.mending import differences, mended, plausible
from twfs.recovery.verdicts import judge
from twfs.secret import SECRET_BYTES
from twfs.store import Finding
from twfs.units import ALIGN, ModelId

PROBES_MAX: Final = 16  # headers asked what a lost model was: one sealed one is enough


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did, one line each; what it could not mend; and blocks before and after."""

    done: tuple[str, ...]
    left: tuple[Finding, ...]
    blocks_before: int
    blocks: int
    holes: int
    seconds: float


def run(directory: Path, *, data: bool = False) -> RepairReport:
    """Mend the warehouse in *directory*; with *data* every payload is read and must be right.

    CorruptMetadata if that takes a rebuild, and whatever subject.offline raises: then nothing has
    been changed.
    """
    began = time.monotonic()
    done: list[str] = []
    with offline(directory, read_only=False) as subject:
        with subject.metadata.read() as view:
            taken = take_snapshot(view)
        roster = newest_roster(subject.devices.values(), subject.secret, subject.uuid)
        _refuse_old_copy(subject, taken, roster)
        for device in subject.devices.values():
            done += [
                f"device {device.index}: {which} superblock copy written again"
                for which in device.mend_superblocks()
            ]
        known = replace(taken, models=_find_models(subject, taken, roster, done))
        verdicts = judge(subject, known, data=data)
        meant = mended(subject, known, verdicts, roster, done)
        changes = differences(taken, meant, verdicts, done)
        if changes.gone or changes.fresh:
            subject.metadata.submit(changes.write).result()
        _mend_files(subject, done)
        _mend_secret(subject, done)
        _mend_roster(subject, roster, done)
        report = invariants.run(subject, data=data)
    return RepairReport(
        tuple(done), report.findings, len(taken), len(meant), int(meant.hole.sum()),
        round(time.monotonic() - began, 3),
    )  # fmt: skip


def _refuse_old_copy(subject: Subject, taken: Snapshot, roster: Roster | None) -> None:
    """Raise CorruptMetadata if the metadata is older than the devices: blocks would be lost."""
    unreadable = any((each.table, each.key) == ("meta", b"roster") for each in taken.unreadable)
    ahead = 0 if roster is None or unreadable else roster.sequence - taken.roster_sequence
    if ahead > 1:
        raise CorruptMetadata(
            f"{subject.metadata.directory} is older than the devices: their roster has changed "
            f"{ahead} times since; put the newest metadata there, or run `twfs rebuild`"
        )


def _find_models(
    subject: Subject, taken: Snapshot, roster: Roster | None, done: list[str]
) -> dict[ModelId, ModelRecord]:
    """The models, with those that the roster and sealed headers prove to be missing."""
    models = dict(taken.models)
    listed = {} if roster is None else {each.name: each for each in roster.models}
    for number in np.unique(taken.model[~taken.known]).tolist():
        header = _any_header(subject, taken, number)
        of = None if header is None else listed.get(header.model_name)
        if header is None or of is None:
            continue
        if any(each.name == of.name and each.epoch >= of.epoch for each in models.values()):
            continue
        if (header.epoch, header.fingerprint) == (of.epoch, of.layout.fingerprint):
            found = ModelRecord(ModelId(number), of.name, of.epoch, of.layout, of.created_ms)
            models[found.id] = found
            done.append(f"model {of.name}: its record, number {number}, is made from the roster")
    newest = replace(taken, models=models).meant_names()
    for name, of in listed.items():
        if name not in newest or models[newest[name]].epoch < of.epoch:
            number = max(plausible(taken.counters["model"]), *(each + 1 for each in models), 1)
            found = ModelRecord(ModelId(number), name, of.epoch, of.layout, of.created_ms)
            models[found.id] = found
            done.append(f"model {name}: epoch {of.epoch} is taken over from the roster")
    return models


def _any_header(subject: Subject, taken: Snapshot, model: int) -> Header | None:
    """A sealed header of a block of the number *model*, one that says what its record says."""
    rows = invariants.with_header(subject, taken)
    rows = np.intersect1d(np.flatnonzero(taken.model == model), rows)
    for row in rows[:PROBES_MAX].tolist():
        key, block = taken.key(row), taken.block(row)
        first, data = block.extents[0], aligned_buffer(ALIGN)
        try:
            subject.devices[first.device].read_into([data], first.offset)
            header = Header.unpack(data)
        except (ValueError, DeviceError):
            continue
        same = (header.prefix_hash, header.block.generation) == (key.prefix_hash, block.generation)
        if same and sealed_with(subject.secret, data):
            return header
    return None


def _mend_files(subject: Subject, done: list[str]) -> None:
    """Forget what is said of files if any of it is untrue: the next start reads it from blocks."""
    with subject.metadata.read() as view:
        wrong = next(complaints(view), None)
        old = [(table, key) for table in ("files", "paths") for key, _ in view.raw(table)]
    if wrong is None:
        return

    def forget(view: WriteView) -> None:
        for table, key in old:
            view.delete_raw(table, key)

    subject.metadata.submit(forget).result()
    done.append(f"rows and names of files are made anew at the next start: {wrong}")


def _mend_secret(subject: Subject, done: list[str]) -> None:
    """Put the secret into the metadata if only the file beside it has it."""
    with subject.metadata.read() as view:
        there = len(view.meta("secret") or b"") == SECRET_BYTES
    if not there:
        subject.metadata.submit(lambda view: view.set_meta("secret", subject.secret)).result()
        done.append("the secret is copied from its file into the metadata")


def _mend_roster(subject: Subject, newest: Roster | None, done: list[str]) -> None:
    """Write the roster that the metadata means, unless it is there already.

    No epoch becomes lower by it: those of the roster have entered the metadata before.
    """
    with subject.metadata.read() as view:
        value = view.meta("roster") or b""
        known = LENGTH.unpack(value)[0] if len(value) == LENGTH.size else 0
        before = newest or Roster(known)
        meant = roster_of(view, max(known, before.sequence), before)
    if meant == newest and known == meant.sequence:
        return
    meant = replace(meant, sequence=meant.sequence + 1)
    write_roster(subject.devices.values(), meant, subject.secret, subject.uuid)

    def note(view: WriteView) -> None:
        view.set_meta("roster", LENGTH.pack(meant.sequence))

    subject.metadata.submit(note).result()
    done.append(f"the roster is written again, as number {meant.sequence}")
