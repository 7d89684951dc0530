"""Headers and payloads of many blocks, read in the order of their places, and proved.

What is right is settled for a whole run of the device at once; what is not goes, one block at a
time, through the same functions that serve the mount, and these say what is wrong. Blocks on the
devices; thread-safe, and reads with several threads.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import xxhash

from twfs.checking.snapshot import Snapshot
from twfs.checking.subject import Subject
from twfs.checksums import lanes_of, xxh3_of
from twfs.devices.payload import aligned_buffer, header_complaint, read_payload
from twfs.errors import BadPayload, DeviceError, InvalidInput
from twfs.index.slots import IntArray
from twfs.metadata.tables import ModelRecord
from twfs.records import (
    EXTENT_DTYPE,
    FORMAT_VERSION,
    HEADER_DTYPE,
    HEADER_MAGIC,
    LAYER_SUMS_MAX,
    SUM,
    Block,
    BlockKey,
    Header,
    sealed_with,
)
from twfs.units import ALIGN, NAME_BYTES_MAX, ByteOffset, ModelId

T = TypeVar("T")

SPAN_BYTES_MAX: Final = 4 << 20  # read at once; larger blocks are read alone
GAP_BYTES_MAX: Final = 64 << 10  # read over rather than read around: as long as one more I/O takes
# One reads while another computes; the interpreter lets only so many compute.
THREADS: Final = min(8, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong with one block; *lost* if the device does not have what was written there.

    Else *header* is what lies there: sealed, and it says something else than the record.
    """

    row: int
    text: str
    lost: bool
    header: Header | None = None


@dataclass(frozen=True, slots=True)
class _Span:
    """A run of one device, and the blocks whose headers (and payloads) lie in it."""

    device: int
    offset: int
    length: int
    rows: list[int]


def prove_headers(subject: Subject, taken: Snapshot, rows: IntArray) -> Iterator[Complaint]:
    """Look at the headers of *rows*, which have a first extent inside a data area."""

    def look(span: _Span) -> list[Complaint]:
        good, buffer = _read(subject, taken, span)
        found = []
        for row, fine, at in zip(span.rows, good, _places(taken, span), strict=True):
            if not fine:
                header = None if buffer is None else buffer[at : at + ALIGN]
                complaint = judge_header(subject, taken, row, header)
                if complaint is not None:
                    found.append(complaint)
        return found

    offsets = taken.rows["offset"][rows].astype(np.int64)
    yield from _all_at_once(look, _spans(taken, rows, offsets + ALIGN))


def prove_payloads(subject: Subject, taken: Snapshot, rows: IntArray) -> Iterator[Complaint]:
    """Read the payloads of *rows*, all of whose extents are inside data areas."""

    def look(span: _Span) -> list[Complaint]:
        good, buffer = _read(subject, taken, span)
        found = []
        for row, fine, at in zip(span.rows, good, _places(taken, span), strict=True):
            if buffer is None or not (fine and _payload_is_right(taken, row, buffer[at:])):
                complaint = judge_payload(subject, taken, row)
                if complaint is not None:
                    found.append(complaint)
        return found

    def look_alone(row: int) -> list[Complaint]:
        complaint = judge_payload(subject, taken, row)
        return [] if complaint is None else [complaint]

    lengths = taken.rows["units"].astype(np.int64)[rows] * ALIGN
    alone = (taken.rows["extent_count"][rows] > 1) | (lengths > SPAN_BYTES_MAX)
    offsets = taken.rows["offset"][rows].astype(np.int64)
    spans = _spans(taken, rows[~alone], (offsets + lengths)[~alone])
    yield from _all_at_once(look, spans)
    yield from _all_at_once(look_alone, rows[alone].tolist())


def _all_at_once(look: Callable[[T], list[Complaint]], works: list[T]) -> Iterator[Complaint]:
    """Run *look* over *works* in several threads."""
    with ThreadPoolExecutor(THREADS, "twfs-check") as pool:
        for found in pool.map(look, works):
            yield from found


def _spans(taken: Snapshot, rows: IntArray, ends: IntArray) -> list[_Span]:
    """Cut the devices into runs that hold *rows*, of which so much up to *ends* is wanted."""
    devices = taken.rows["device"][rows].astype(np.int64)
    offsets = taken.rows["offset"][rows].astype(np.int64)
    order = np.lexsort((offsets, devices))
    spans: list[_Span] = []
    for row, device, offset, end in zip(
        rows[order].tolist(), devices[order].tolist(), offsets[order].tolist(),
        ends[order].tolist(), strict=True,
    ):  # fmt: skip
        last = spans[-1] if spans else None
        if (
            last is not None
            and last.device == device
            and offset <= last.offset + last.length + GAP_BYTES_MAX
            and end <= last.offset + SPAN_BYTES_MAX
        ):
            last.rows.append(row)
            length = max(last.length, end - last.offset)
            spans[-1] = _Span(device, last.offset, length, last.rows)
        else:
            spans.append(_Span(device, offset, end - offset, [row]))
    return spans


def _places(taken: Snapshot, span: _Span) -> list[int]:
    """Where in *span* its blocks begin."""
    return [int(taken.rows["offset"][row]) - span.offset for row in span.rows]


def _read(subject: Subject, taken: Snapshot, span: _Span) -> tuple[list[bool], memoryview | None]:
    """Read a span; which of its headers are right in all, and the bytes, if there are any."""
    buffer = aligned_buffer(span.length)
    try:
        subject.devices[span.device].read_into([buffer], ByteOffset(span.offset))
    except DeviceError:  # part of it may be there: each block is asked for alone
        return [False] * len(span.rows), None
    units = np.frombuffer(buffer, np.uint8).reshape(-1, ALIGN)
    at = np.array(_places(taken, span), np.int64)
    packed = units[at // ALIGN]
    headers = packed.view(HEADER_DTYPE).reshape(-1)
    good = _says_the_same(subject, taken, np.array(span.rows), headers)
    for number in np.flatnonzero(good).tolist():
        data = packed[number].data
        good[number] = sealed_with(subject.secret, data) and (
            xxhash.xxh3_64_intdigest(data[: -SUM.size]) == int(headers["sum"][number])
        )
    return good.tolist(), buffer


def _says_the_same(
    subject: Subject, taken: Snapshot, rows: IntArray, headers: IntArray
) -> IntArray:
    """Tell which headers say what the records say; what needs a closer look counts as wrong."""
    records = taken.rows[rows]
    good = (headers["magic"] == np.void(HEADER_MAGIC)) & (headers["version"] == FORMAT_VERSION)
    good &= (records["extent_count"] == 1) & (headers["extent_count"] == 1)
    good &= headers["layers"] <= LAYER_SUMS_MAX
    for name in ("offset", "generation", "payload_bytes", "ino", "xxh3", "lane_plain", "digest",
                 "lane_weighted", "key_bytes"):  # fmt: skip
        good &= headers[name] == records[name]
    extents = np.zeros(len(rows), EXTENT_DTYPE)
    for name in ("offset", "units", "device"):
        extents[name] = records[name]
    good &= headers["first_extent"] == extents.view(f"V{EXTENT_DTYPE.itemsize}")
    good &= headers["prefix_hash"] == taken.prefix_hash[rows].view("V16")
    good &= (headers["group"] == taken.group[rows]) & (headers["shard"] == taken.shard[rows])
    good &= headers["warehouse"] == np.void(subject.uuid.bytes)
    device = subject.devices[int(records["device"][0])]
    good &= headers["device"] == np.void(device.uuid.bytes)
    good &= _is_of_its_model(taken, rows, headers)
    for number in np.flatnonzero(good & (records["key_bytes"] > 0)).tolist():
        own = taken.own_key(int(rows[number]))
        good[number] = headers["key"][number].tobytes()[: len(own)] == own
    return np.asarray(good)


def _is_of_its_model(taken: Snapshot, rows: IntArray, headers: IntArray) -> IntArray:
    """Tell which headers name model, epoch and layout of their block."""
    good = np.zeros(len(rows), np.bool_)
    models = taken.model[rows]
    for number in np.unique(models).tolist():
        record = taken.models.get(ModelId(number))
        if record is None:
            continue
        name = record.name.encode()
        mine = (models == number) & (headers["epoch"] == record.epoch)
        mine &= headers["fingerprint"] == np.void(record.layout.fingerprint)
        mine &= headers["name_bytes"] == len(name)
        mine &= headers["name"] == np.void(name.ljust(NAME_BYTES_MAX, b"\0"))
        good |= mine
    return good


def judge_header(
    subject: Subject, taken: Snapshot, row: int, data: memoryview | None = None
) -> Complaint | None:
    """Say what is wrong with one header, read here where *data* is not its bytes."""
    key, block = taken.key(row), taken.block(row)
    first = block.extents[0]
    sealed: Header | None = None
    try:
        if data is None:
            data = aligned_buffer(ALIGN)
            subject.devices[first.device].read_into([data], first.offset)
        header = Header.unpack(data)
        if sealed_with(subject.secret, data):
            sealed = header
        complaint = header_fault(subject, taken.models.get(key.model), key, block, data)
    except (ValueError, DeviceError, InvalidInput) as error:  # InvalidInput: outside of it
        complaint = str(error)
    if complaint is None or not subject.unchanged(key, block):
        return None
    text = f"block {key.prefix_hash.hex()} at {first}: {complaint}"
    return Complaint(row, text, sealed is None, sealed)


def header_fault(
    subject: Subject, model: ModelRecord | None, key: BlockKey, block: Block, packed: memoryview
) -> str | None:
    """What is wrong with the *packed* header of a block of *model*, in words; None if nothing is.

    ValueError if it cannot be unpacked.
    """
    header, on = Header.unpack(packed), subject.devices[block.extents[0].device]
    complaint = header_complaint(header, key, block)
    if complaint is not None:
        return complaint
    if (header.warehouse, header.device) != (subject.uuid, on.uuid):
        return "its header is of another warehouse or device"
    if model is not None and (header.fingerprint, header.model_name, header.epoch) != (
        model.layout.fingerprint, model.name, model.epoch,
    ):  # fmt: skip
        return "its header is of another model, epoch or layout"
    if not sealed_with(subject.secret, packed):
        return "its header is not sealed with this warehouse's secret"
    return None


def _payload_is_right(taken: Snapshot, row: int, data: memoryview) -> bool:
    """Tell whether the payload in *data*, which begins with its header, has its sums."""
    record = taken.rows[row]
    payload = data[ALIGN : ALIGN + int(record["payload_bytes"])]
    return (
        xxh3_of(payload) == record["xxh3"].tobytes()
        and lanes_of(payload) == (int(record["lane_plain"]), int(record["lane_weighted"]))
    )  # fmt: skip


def judge_payload(subject: Subject, taken: Snapshot, row: int) -> Complaint | None:
    """Read one block whole and say what is wrong with it."""
    key, block = taken.key(row), taken.block(row)
    try:
        read_payload(subject.devices, key, block, lanes=True)
    except (BadPayload, DeviceError) as error:
        if subject.unchanged(key, block):
            return Complaint(row, str(error), lost=True)
    return None
