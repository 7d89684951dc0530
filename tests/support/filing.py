"""Files written and read through the library, as the mount does it."""

import stat
from collections.abc import Sequence

from twfs.checksums import lanes_of, xxh3_of
from twfs.datapath.offering import begin_put
from twfs.devices.payload import aligned_buffer
from twfs.metadata import filetables, ledger
from twfs.metadata.filerows import FileRow, content_names, tail_of
from twfs.metadata.tables import WriteView
from twfs.store import ArenaBlock, PutOutcome, Retention
from twfs.units import ALIGN, ByteCount, Ino
from twfs.vfs.files import Files

WRITER = 4711  # stands for a process


def make_file(
    files: Files, parent: int, name: bytes, data: bytes, *, mode: int = 0o644, uid: int = 0
) -> Ino:
    """Write a whole file and publish it; its inode."""
    draft = files.create(parent, name, mode=mode, uid=uid, gid=0, writer=WRITER)
    files.open_draft(draft, writing=True)
    for at in range(0, len(data), 1 << 20):
        if not draft.write_quickly(at, data[at : at + (1 << 20)]):
            draft.write(at, data[at : at + (1 << 20)])
    assert files.close_draft(draft, writing=True)
    files.publish(draft)
    return draft.ino


def make_empty_files(files: Files, parent: int, names: Sequence[bytes]) -> None:
    """Make an empty file of each name in one transaction: rows and blocks as if each was closed.

    A close through the mount takes milliseconds, so that many files would take minutes.
    """
    model, now = files.blocks.need_model(*files.root_owner), files.blocks.now_ns()
    _, inos = files._core.take_numbers(len(names))
    rows = [
        FileRow(
            ino, Ino(parent), name, stat.S_IFREG | 0o644, 0, 0, blocks=1,
            mtime_ns=now, ctime_ns=now,
        )
        for ino, name in zip(inos, names, strict=True)
    ]  # fmt: skip
    tails = [tail_of(row) for row in rows]
    put = begin_put(
        files._core, model.id, files.blocks.names([content_names(row)[0] for row in rows]),
        group=0, shard=0, retention=Retention.STANDARD, lengths=list(map(len, tails)),
    )  # fmt: skip
    arena = aligned_buffer(ALIGN * len(rows))
    blocks = []
    for index, tail in enumerate(tails):
        payload = arena[index * ALIGN : index * ALIGN + len(tail)]
        payload[:] = tail
        blocks.append(
            ArenaBlock(
                index, index * ALIGN, ByteCount(len(tail)), xxh3_of(payload), *lanes_of(payload)
            )
        )
    put.write_blocks(arena, blocks)

    def enter(view: WriteView, done: ledger.Published) -> None:
        assert set(done.outcomes) == {PutOutcome.PUBLISHED}
        for row in rows:
            filetables.enter(view, row, now, over=False)

    put.publish(enter, lambda _: None)


def content(files: Files, row: FileRow) -> bytes:
    """The verified bytes of a published file."""
    return b"".join(bytes(files.blocks.read(row, index)) for index in range(row.blocks))


def tree_of(files: Files, parent: int = 0, above: bytes = b"") -> dict[bytes, bytes | None]:
    """All paths below *parent* with their bytes; None for a directory."""
    found: dict[bytes, bytes | None] = {}
    for name, ino in files.names(parent):
        path, row = above + b"/" + name, files.row(ino)
        found[path] = None if row.is_directory else content(files, row)
        if row.is_directory:
            found |= tree_of(files, ino, path)
    return found
