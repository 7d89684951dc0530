"""Verifies blocks where cuFile put them, in a GPU's or the host's memory, and delivers them.

Does no I/O. Functions for one thread at a time per wave of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from twfs.checksums import (
    MASK_64,
    Bytes,
    copy_bytes,
    lanes_of_rows,
    lanes_tensor,
    loaded_torch,
    row_lanes_on_device,
)
from twfs.readers.base import HEADER_BYTES, BlockRead, scatter
from twfs.units import ALIGN


@dataclass(slots=True)
class Job:
    """One block of a wave: *memory* is a flat array or tensor of header plus padded payload.

    Direct jobs have only the payload in it: the destination itself.
    """

    block: BlockRead
    at: int  # place among the blocks of the read
    memory: Any
    staged_at: int | None  # place in the staging buffer, None for direct ones
    failed: bool = False


def _payload(job: Job) -> Any:
    """The payload in a job's memory, without header and padding."""
    if job.staged_at is None:
        return job.memory
    return job.memory[HEADER_BYTES : HEADER_BYTES + job.block.payload_bytes]


def _clear_bad(jobs: Sequence[Job], good: Sequence[bool]) -> None:
    """Take wrong bytes out of destinations that were read into directly."""
    for job, right in zip(jobs, good, strict=True):
        if not right and job.staged_at is None:
            job.block.targets[0].clear()


def deliver_on_host(jobs: Sequence[Job]) -> list[bool]:
    """Verify and copy out blocks in host memory; tell which were right."""
    good = []
    for job in jobs:
        payload: Bytes = _payload(job)
        sums = job.block.checksums
        right = not job.failed and xxhash.xxh3_128_digest(payload.data) == sums.xxh3
        good.append(right)
        at = 0
        for target in job.block.targets if right and job.staged_at is not None else ():
            assert target.array is not None
            copy_bytes(target.array, payload[at : at + target.byte_count])
            at += target.byte_count
    _clear_bad(jobs, good)
    return good


def deliver_on_device(jobs: Sequence[Job], staging: Any) -> list[bool]:
    """Verify and scatter blocks in GPU memory, on the current stream; tell which were right."""
    whole = [job for job in jobs if not job.failed]
    staged = [job for job in whole if job.staged_at is not None]
    direct = [job for job in whole if job.staged_at is None]
    sums = dict(zip(map(id, staged), _staged_lanes(staging, staged), strict=True))
    if direct:
        totals = loaded_torch().stack([lanes_tensor(job.memory) for job in direct]).tolist()
        for job, (plain, weighted) in zip(direct, totals, strict=True):
            sums[id(job)] = (plain & MASK_64, weighted & MASK_64)
    good = []
    for job in jobs:
        stated = job.block.checksums
        good.append(sums.get(id(job)) == (stated.lane_plain, stated.lane_weighted))
    scatter(
        [
            (job.block.targets, _payload(job))
            for job, right in zip(jobs, good, strict=True)
            if right and job.staged_at is not None
        ]
    )
    _clear_bad(jobs, good)
    return good


def _staged_lanes(staging: Any, jobs: Sequence[Job]) -> list[tuple[int, int]]:
    """Return the lane sums of the payloads of *jobs* in the staging buffer, with one wait.

    The GPU sums every 4 KiB row there; the few bytes per row that this gives are put together
    here. Rows that a payload ends in are summed again without what lies behind it.
    """
    if not jobs:
        return []
    torch = loaded_torch()
    sums = row_lanes_on_device(staging)
    first = np.array([(_staged_at(job) + HEADER_BYTES) // ALIGN for job in jobs], np.uint64)
    count = np.array([job.block.padded_bytes // ALIGN for job in jobs], np.uint64)
    tails = np.array([job.block.payload_bytes % ALIGN for job in jobs], np.int64)
    cut = np.flatnonzero(tails)
    if cut.size:
        last = torch.from_numpy((first + count - np.uint64(1))[cut].astype(np.int64))
        last = last.to(staging.device)
        lengths = torch.from_numpy(tails[cut]).to(staging.device)
        rows = staging.view(-1, ALIGN)[last]
        rows *= torch.arange(ALIGN, device=staging.device) < lengths[:, None]
        sums[:, last] = row_lanes_on_device(rows.view(-1))
    plain, weighted = lanes_of_rows(sums.cpu().numpy().view(np.uint64), first, count)
    return list(zip(plain.tolist(), weighted.tolist(), strict=True))


def _staged_at(job: Job) -> int:
    """Where a staged job's header lies in the staging buffer."""
    assert job.staged_at is not None
    return job.staged_at
