"""The blocks of the mounted files: made, found, read and removed. Names are files.py's.

Methods block on devices or commits unless they say otherwise; thread-safe.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final

from twfs.checksums import lanes_of, xxh3_of
from twfs.core import enrolling, listing
from twfs.core.state import Core
from twfs.datapath.offering import begin_put
from twfs.datapath.putting import Put
from twfs.devices.payload import aligned_buffer
from twfs.errors import BlockGone, DeviceError, NoSuchBlock, WarehouseFull
from twfs.eviction import evicting, retaining
from twfs.layout import FILES_NAME
from twfs.metadata import filetables, ledger
from twfs.metadata.filerows import (
    FILES_LAYOUT,
    PAYLOAD_BYTES_MAX,
    ROOT_INO,
    FileRow,
    content_key,
    content_names,
    names_of,
    piece_bytes,
    row_key,
    row_name,
    tail_of,
)
from twfs.metadata.filetables import RowChanged
from twfs.metadata.tables import ModelRecord, WriteView
from twfs.prefix import Names, OwnKey, names_of_keys, root_of
from twfs.records import BlockKey
from twfs.store import ArenaBlock, BlockInfo, PutOutcome, Retention
from twfs.units import ByteCount, align_up
from twfs.vfs.drafts import Draft

ROOT_MODE: Final = 0o40770
WRITERS: Final = 4  # pieces of one file written at once: each device wants several in flight
RETENTIONS: Final = tuple(Retention)

Also = Callable[[WriteView], Any]
Then = Callable[[Any], None]


class FileBlocks:
    """See the module's docstring."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._making = threading.Lock()
        self._workers = ThreadPoolExecutor(WRITERS, "twfs-files")

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()

    # The model

    @property
    def model(self) -> ModelRecord | None:
        """The model of all files' blocks; None before the first. Waits for nothing."""
        with self._core.lock:
            number = self._core.current.get(FILES_NAME)
            return None if number is None else self._core.models[number]

    def need_model(self, uid: int, gid: int) -> ModelRecord:
        """The model, made for the first file, with a root directory of that owner."""
        with self._making:
            model = self.model
            if model is None:
                model = enrolling.enter_model(self._core, FILES_NAME, FILES_LAYOUT, anew=False)
            with self._core.metadata.read() as view:
                root = filetables.get_row(view, ROOT_INO)
            if root is None:
                root = self.fresh_root(uid, gid)
                self._core.metadata.submit(lambda view: filetables.put_row(view, root)).result()
            return model

    def fresh_root(self, uid: int, gid: int) -> FileRow:
        """The root before anybody has changed it."""
        now = self.now_ns()
        return FileRow(ROOT_INO, ROOT_INO, b"", ROOT_MODE, uid, gid, mtime_ns=now, ctime_ns=now)

    def now_ns(self) -> int:
        """The time of the warehouse's clock."""
        return self._core.clock() * 1_000_000

    def names(self, keys: Sequence[OwnKey]) -> Names:
        """The names of blocks by their own keys."""
        model = self._known()
        return names_of_keys(root_of(model.layout.fingerprint, model.epoch), keys)

    def _known(self) -> ModelRecord:
        model = self.model
        if model is None:
            raise NoSuchBlock("there are no files yet")
        return model

    # Making

    def store(self, draft: Draft, row: FileRow) -> Put:
        """Write the blocks of *draft* to the devices, with *row* behind them; publishes nothing.

        Hold the draft's lock. WarehouseFull, DeviceError.
        """
        keys = content_names(row)
        tails = [tail_of(row) if index == row.blocks - 1 else b"" for index in range(row.blocks)]
        lengths = [piece_bytes(row, index) + len(tail) for index, tail in enumerate(tails)]
        put = self._begin(row, keys, lengths)
        try:
            self._write_pieces(put, draft, [(piece_bytes(row, i), t) for i, t in enumerate(tails)])
            if not put.whole:
                raise DeviceError(f"{row.name!r} did not reach the devices: see `twfs status`")
        except BaseException:
            put.abandon()
            raise
        return put

    def _begin(self, row: FileRow, keys: Sequence[OwnKey], lengths: Sequence[int]) -> Put:
        core, operators = self._core, self._core.tenants.operators
        retention = Retention.PINNED if row.is_directory else RETENTIONS[row.retention]
        put = begin_put(
            core, self._known().id, self.names(keys), group=0, shard=0, retention=retention,
            uid=None if row.uid in operators else row.uid, lengths=lengths,
            beside_share=row.is_directory,  # files.DIRECTORY_PARTS bounds those
        )  # fmt: skip
        if len(put.lacking) != len(keys):
            there = put.is_present
            put.abandon()
            if there:  # another has stored this version of the row
                raise RowChanged
            needed = sum(align_up(length) for length in lengths)
            raise WarehouseFull(f"no room for the {needed} bytes of {row.name!r}: evict some")
        return put

    def _write_pieces(self, put: Put, draft: Draft, parts: Sequence[tuple[int, bytes]]) -> None:
        """Write all pieces of *draft* (size and tail of each), several at once; waits for all."""
        others = [
            self._workers.submit(self._write_piece, put, draft, index, *part)
            for index, part in enumerate(parts[1:], 1)
        ]
        try:
            self._write_piece(put, draft, 0, *parts[0])
        finally:
            wait(others)
        for each in others:
            each.result()

    @staticmethod
    def _write_piece(put: Put, draft: Draft, index: int, size: int, tail: bytes) -> None:
        with draft.payload(index, size, tail) as memory:
            write_one(put, index, memory, size + len(tail))

    def put_row(self, row: FileRow, also: Also, then: Then) -> None:
        """Publish a block that carries *row*, with what *also* does; see Put.publish."""
        tail = tail_of(row)
        put = self._begin(row, [row_name(row)], [len(tail)])
        try:
            memory = aligned_buffer(align_up(len(tail)))
            memory[: len(tail)] = tail
            write_one(put, 0, memory, len(tail))
        except BaseException:
            put.abandon()
            raise
        self.publish(put, row, also, then)

    def publish(self, put: Put, row: FileRow, also: Also, then: Then) -> None:
        """Publish all blocks of *put* and do *also* in one transaction, or neither.

        DeviceError; RowChanged if another was first; what *also* raises.
        """

        def job(view: WriteView, done: ledger.Published) -> Any:
            wanted = len(put.lacking)
            published = done.outcomes.count(PutOutcome.PUBLISHED)
            if PutOutcome.PRESENT in done.outcomes:
                raise RowChanged
            if published != wanted or len(done.outcomes) != wanted:
                raise DeviceError(f"{row.name!r} did not reach the devices: see `twfs status`")
            return also(view)

        put.publish(job, then)

    # Finding and reading

    def info(self, row: FileRow, index: int) -> BlockInfo:
        """The block with piece *index* of a file; BlockGone. Waits for nothing."""
        names, model = self.names([OwnKey(content_key(row, index))]), self._known()
        try:
            return listing.block_info(self._core, BlockKey(model.id, names.hash_at(0)))
        except NoSuchBlock as error:
            raise BlockGone(f"{row.name!r} has been evicted") from error

    def read(self, row: FileRow, index: int) -> memoryview:
        """The verified bytes of piece *index*; BlockGone, BadPayload, DeviceError."""
        payload = listing.read_block(self._core, self.info(row, index))
        return payload[: piece_bytes(row, index)]

    def use(self, row: FileRow) -> None:
        """Count a use of all blocks of a file. Waits for nothing."""
        hashes = self.names(names_of(row))
        model = self._known()
        with self._core.lock, self._core.metadata.read() as view:
            blocks = [
                view.block(BlockKey(model.id, hashes.hash_at(index)))
                for index in range(len(hashes))
            ]
            slots = [int(block.slot) for block in blocks if block is not None]
            self._core.slots.use(slots, self._core.clock())

    def used_ms(self, row: FileRow) -> int:
        """When a file was used last; 0 where that is not known. Waits for nothing."""
        model = self.model
        if model is None or row.is_directory:
            return 0
        names = self.names([OwnKey(row_key(row))])
        with self._core.lock, self._core.metadata.read() as view:
            block = view.block(BlockKey(model.id, names.hash_at(0)))
            return 0 if block is None else int(self._core.slots.stamp[block.slot])

    def set_retention(self, row: FileRow, retention: Retention) -> None:
        """Give the blocks of a file a class; waits for a commit. NoSuchBlock."""
        names = self.names(names_of(row))
        head = names.hash_at(len(names) - 1)
        retaining.set_retention(self._core, self._known().id, head, retention)

    # Removing

    def discard(self, rows: Iterable[FileRow]) -> "list[Future[ledger.Removed]]":
        """Queue the removal of all blocks of files that are gone. Waits for nothing."""
        return self._discard([key for row in rows for key in names_of(row)])

    def discard_row(self, row: FileRow) -> "list[Future[ledger.Removed]]":
        """Queue the removal of the block that carried a row which has changed since."""
        if not row.version and not row.is_directory:
            return []  # it is the last block of the file itself
        return self._discard([row_name(row)])

    def _discard(self, keys: Sequence[OwnKey]) -> "list[Future[ledger.Removed]]":
        model = self.model
        if model is None or not keys:
            return []
        names = self.names(keys)
        hashes = [names.hash_at(index) for index in range(len(names))]
        return evicting.remove_chain(self._core, model.id, hashes)


def write_one(put: Put, index: int, memory: memoryview, length: int) -> None:
    """Write block *index* of a put, *length* bytes at the beginning of *memory* (4 KiB-aligned)."""
    assert length <= PAYLOAD_BYTES_MAX
    payload = memory[:length]
    plain, weighted = lanes_of(payload)
    block = ArenaBlock(index, 0, ByteCount(length), xxh3_of(payload), plain, weighted)
    put.write_blocks(memory, [block])
