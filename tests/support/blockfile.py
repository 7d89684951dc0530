"""Writes blocks to an image or block device as the daemon would, and locates them for a Match."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt

from twfs.checksums import checksums_of, layer_sums_of
from twfs.datapath.match import Match
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.readers.select import DeviceSource, Readers
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE, Block, BlockKey, Extent, Header
from twfs.store import Model, ReadOutcome, Served
from twfs.units import (
    ALIGN,
    ByteCount,
    ByteOffset,
    DeviceIndex,
    Digest,
    Generation,
    Ino,
    Millis,
    ModelId,
    PrefixHash,
    Slot,
    TokenCount,
    align_up,
)

WAREHOUSE, DEVICE = UUID(int=1), UUID(int=2)
TOKEN = b"lease"


@dataclass
class Holder:
    """A LeaseHolder that holds for so many questions; remembers what it was told."""

    questions: int = 1 << 30
    reports: list[tuple[BlockKey, int, ReadOutcome]] = field(default_factory=list)
    released: int = 0

    def held(self, token: bytes) -> bool:  # noqa: ARG002
        self.questions -= 1
        return self.questions >= 0 and not self.released

    def release(self, token: bytes, served: Sequence[Served] = ()) -> None:  # noqa: ARG002
        self.released += 1

    def renew(self, token: bytes) -> bool:  # noqa: ARG002
        return not self.released

    def report(self, key: BlockKey, generation: int, outcome: ReadOutcome) -> None:
        self.reports.append((key, generation, outcome))


class BlockFile:
    """Some devices of *size_bytes* each, filled from 1 MiB on with the blocks given to write."""

    def __init__(self, paths: Sequence[Path], layout: Layout, size_bytes: int = 64 << 20) -> None:
        self.layout = layout
        self.paths = list(paths)
        self.size_bytes = size_bytes
        self.blocks: list[tuple[int, int, Block]] = []  # group, shard
        self._next = [1 << 20] * len(paths)
        self._fds = []
        for path in paths:
            if not path.is_block_device():
                with path.open("wb") as file:
                    file.truncate(size_bytes)
            self._fds.append(os.open(path, os.O_RDWR))
        self.sources: dict[DeviceIndex, DeviceSource] = {}

    def write(
        self,
        payload: bytes,
        *,
        device: int = 0,
        group: int = 0,
        shard: int = 0,
        cuts: Sequence[tuple[int, int]] = (),
    ) -> Block:
        """Write one block, contiguously, or as *cuts*: (device, bytes of header and payload)."""
        padded = payload.ljust(align_up(len(payload)), b"\0")
        extents, at = [], 0
        for on, length in cuts or ((device, ALIGN + len(padded)),):
            gap = ALIGN if cuts else 0  # so that no two extents of a block touch
            extents.append(Extent(DeviceIndex(on), ByteOffset(self._next[on]), ByteCount(length)))
            self._next[on] += length + gap
        index = sum(1 for g, s, _ in self.blocks if (g, s) == (group, shard))
        block = Block(
            Generation(1000 + len(self.blocks)), Ino(0), Slot(0), PrefixHash(bytes(16)),
            Digest(bytes(32)), TokenCount((index + 1) * self.layout.block_tokens),
            ByteCount(len(payload)), checksums_of(payload), tuple(extents), Millis(0),
        )  # fmt: skip
        header = Header(
            WAREHOUSE, DEVICE, self.layout.fingerprint, "model", 0, group, shard,
            hash_of(index), block, layer_sums_of(payload, self.layout.summed_layers(group)),
        )  # fmt: skip
        whole = header.pack(bytes(32)) + padded
        for extent in extents:
            os.pwrite(self._fds[extent.device], whole[at : at + extent.length], extent.offset)
            at += extent.length
        assert at == len(whole)
        self.blocks.append((group, shard, block))
        return block

    def flip(self, block: Block, payload_byte: int) -> None:
        """Change one bit of a block whose payload lies in its first extent."""
        extent = block.extents[0]
        where = extent.offset + ALIGN + payload_byte
        fd = self._fds[extent.device]
        os.pwrite(fd, bytes([os.pread(fd, 1, where)[0] ^ 0x10]), where)

    def truncate(self, device: int, size_bytes: int) -> None:
        """Cut a device off behind the daemon's back."""
        os.ftruncate(self._fds[device], size_bytes)

    def readers(self, **options: Any) -> Readers:
        """Flush, and open the devices as a client gets them."""
        for index, (fd, path) in enumerate(zip(self._fds, self.paths, strict=True)):
            os.fsync(fd)
            if DeviceIndex(index) not in self.sources:
                own = os.open(path, os.O_RDONLY | os.O_DIRECT)
                self.sources[DeviceIndex(index)] = DeviceSource(own, path, self.size_bytes)
        return Readers(self.sources, **options)

    def match(self, readers: Readers, holder: Holder | None = None, *, start: int = 0) -> Match:
        """Match all blocks from *start* on."""
        rows, extents = self._located(start)
        count = 1 + max((int(row["index"]) for row in rows), default=start - 1)
        names = Names(
            b"".join(map(hash_of, range(count))), bytes(32 * count), bytes(16 * count),
            tuple(range(self.layout.block_tokens, (count + 1) * self.layout.block_tokens,
                        self.layout.block_tokens)),
        )  # fmt: skip
        model = Model(ModelId(7), "model", 0, self.layout)
        return Match(holder or Holder(), TOKEN, model, names, start, count, rows, extents, readers)

    def _located(self, start: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Rows and extents in order of group, shard, index."""
        seen: dict[tuple[int, int], int] = {}
        found = []
        for group, shard, block in self.blocks:
            index = seen.setdefault((group, shard), 0)
            seen[group, shard] += 1
            if index >= start:
                found.append((group, shard, index, block))
        found.sort(key=lambda row: row[:3])
        rows = np.zeros(len(found), LOCATED_DTYPE)
        extents = []
        for row, (group, shard, index, block) in zip(rows, found, strict=True):
            sums = block.checksums
            row["generation"], row["payload_bytes"] = block.generation, block.payload_bytes
            row["lane_plain"], row["lane_weighted"] = sums.lane_plain, sums.lane_weighted
            row["xxh3"], row["prefix_hash"] = np.void(sums.xxh3), np.void(hash_of(index))
            row["group"], row["shard"], row["index"] = group, shard, index
            row["extent_count"] = len(block.extents)
            extents += [extent.pack() for extent in block.extents]
        return rows, np.frombuffer(b"".join(extents), EXTENT_DTYPE)

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._fds + [source.fd for source in self.sources.values()]:
            os.close(fd)


def hash_of(index: int) -> PrefixHash:
    """The prefix hash of block *index*."""
    return PrefixHash(bytes([index % 251] * 15 + [index // 251]))


def random_payload(byte_count: int, seed: int) -> bytes:
    """Bytes that are the same for the same *seed*."""
    return np.random.default_rng(seed).bytes(byte_count)
