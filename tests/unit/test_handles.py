"""The mount's memory of payloads is bounded and reads each once; its memory of inodes is exact."""

import errno

import pyfuse3  # noqa: TID251
import pytest
import trio
from pyfuse3 import FUSEError  # noqa: TID251

from twfs.errors import BlockGone, DeviceError, NotEmpty
from twfs.records import Block, BlockKey, Checksums
from twfs.store import BlockInfo
from twfs.units import (
    ByteCount,
    Digest,
    Generation,
    Ino,
    Millis,
    ModelId,
    PrefixHash,
    Slot,
    TokenCount,
)
from twfs.vfs.nodes import ROOT, SESSION_INOS, BlockFile, SessionDirectory
from twfs_mount import looking
from twfs_mount.handles import Handles, Known, OpenText, Payloads


def info_of(ino: int, size: int = 100) -> BlockInfo:
    block = Block(
        Generation(ino), Ino(ino), Slot(0), PrefixHash(bytes(16)), Digest(bytes(32)),
        TokenCount(16), ByteCount(size), Checksums(bytes(16), 0, 0), (), Millis(0),
    )  # fmt: skip
    return BlockInfo(
        BlockKey(ModelId(1), PrefixHash(ino.to_bytes(16, "big"))), block, 0, Millis(0), 1
    )


async def test_payload_memory_is_bounded_and_keeps_the_last_used() -> None:
    reads: list[int] = []

    async def read(info: BlockInfo) -> memoryview:
        reads.append(info.block.ino)
        await trio.lowlevel.checkpoint()
        return memoryview(bytes(info.block.payload_bytes))

    payloads = Payloads(read, 250)
    for ino in (1, 2, 1, 3):
        assert len(await payloads.payload(info_of(ino))) == 100
    assert reads == [1, 2, 3]
    assert payloads.statistics()["payload_bytes"] == 200
    assert payloads.has(Ino(1))
    assert not payloads.has(Ino(2))
    await payloads.payload(info_of(4, 1000))
    assert payloads.statistics()["payload_bytes"] == 1000, "the block being read is always kept"
    payloads.drop(Ino(4))
    assert payloads.statistics()["payload_bytes"] == 0


async def test_concurrent_requests_for_a_payload_read_it_once() -> None:
    reads: list[int] = []

    async def read(info: BlockInfo) -> memoryview:
        reads.append(info.block.ino)
        await trio.testing.wait_all_tasks_blocked()
        return memoryview(b"x")

    payloads = Payloads(read)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(payloads.payload, info_of(7))
    assert reads == [7]


async def test_failed_read_is_told_to_everybody_and_not_kept() -> None:
    reads: list[int] = []

    async def read(info: BlockInfo) -> memoryview:
        reads.append(info.block.ino)
        await trio.testing.wait_all_tasks_blocked()
        raise DeviceError("it is broken")

    payloads = Payloads(read)
    failed: list[DeviceError] = []

    async def ask() -> None:
        try:
            await payloads.payload(info_of(7))
        except DeviceError as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert len(failed) == len(reads) == 3
    assert not payloads.has(Ino(7))


def test_inode_is_known_from_its_first_lookup_to_its_last_forget() -> None:
    known = Known()
    file = BlockFile(BlockKey(ModelId(1), PrefixHash(bytes(16))), Ino(5000))
    session = SessionDirectory(ModelId(1), PrefixHash(bytes(16)), Ino(SESSION_INOS | 5000))
    for node in (file, file, session):
        known.tell(node)
    known.opened(file)
    assert known.node(5000) == file
    assert set(known.perishable()) == {file, session}
    known.forget(5000, 1)
    assert known.node(5000) == file
    known.forget(5000, 1)
    known.forget(session.ino, 1)
    assert known.perishable() == []
    for ino in (5000, session.ino):
        with pytest.raises(BlockGone):
            known.node(ino)
    known.forget(ROOT.ino, 1)
    assert known.node(ROOT.ino) is ROOT
    assert known.statistics() == {"known_inodes": 5, "known_sessions": 0, "opened_blocks": 0}


def test_numbers_of_open_files_are_not_used_again() -> None:
    handles = Handles()
    first = handles.add(OpenText(b"1"))
    handles.remove(first)
    handles.remove(first)
    assert handles.add(OpenText(b"2")) != first
    assert len(handles) == 1
    with pytest.raises(BlockGone):
        handles.get(first)


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (NotEmpty("it holds names"), errno.ENOTEMPTY),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (KeyError("a bug"), errno.EIO),
        (RecursionError(), errno.EIO),
    ],
)
async def test_handler_raises_nothing_but_fuse_errors(raised: Exception, number: int) -> None:
    @looking.answered
    async def handler() -> None:
        raise raised

    before = looking.FAILURES.count
    with pytest.raises(FUSEError) as caught:
        await handler()
    assert caught.value.errno == number
    assert looking.FAILURES.count - before == (number == errno.EIO)


def test_every_request_is_wrapped() -> None:
    from twfs_mount.operations import Operations

    handlers = [
        name
        for kind in (looking.ReadOperations, Operations)
        for name, value in vars(kind).items()
        if not name.startswith("_") and name in dir(pyfuse3.Operations) and callable(value)
    ]
    assert len(handlers) > 25
    for name in set(handlers) - {"forget"}:
        assert hasattr(getattr(Operations, name), "__wrapped__"), name
