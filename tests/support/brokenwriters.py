"""Writers that are broken on purpose, each in one way that only a power cut shows.

Each function breaks the library under a patch. Until the power goes the checker finds nothing.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import lmdb  # noqa: TID251
import pytest

from twfs.core.state import Core
from twfs.datapath import reserving
from twfs.datapath.putting import Put
from twfs.devices.device import Device
from twfs.devices.payload import aligned_buffer
from twfs.devices.standing import Standings
from twfs.errors import NoSuchFile
from twfs.eviction import choosing, evicting
from twfs.metadata import environment, ledger
from twfs.metadata.environment import Metadata
from twfs.records import HEADER_MAGIC
from twfs.units import ALIGN, ByteOffset
from twfs.vfs.fileblocks import FileBlocks
from twfs.vfs.files import Files
from twfs.warehouse import Warehouse


def no_flush(patch: pytest.MonkeyPatch) -> None:
    """The devices are never flushed."""
    patch.setattr(Standings, "flush", lambda *_: set())


class _Late:
    """Writes that are kept back until the put has been published, or given up."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._kept: list[tuple[Device, memoryview, int]] = []
        self._write = Device.write_from
        publish, abandon = Put.publish, Put.abandon

        def late_publish(put: Put) -> Any:
            result = publish(put)
            self._catch_up()
            return result

        def late_abandon(put: Put) -> None:
            self._catch_up()
            abandon(put)

        patch.setattr(Put, "publish", late_publish)
        patch.setattr(Put, "abandon", late_abandon)

    def keep(self, device: Device, buffers: Sequence[memoryview], offset: int) -> None:
        data = b"".join(buffers)
        kept = aligned_buffer(len(data))
        kept[:] = data
        self._kept.append((device, kept, offset))

    def _catch_up(self) -> None:
        kept, self._kept = self._kept, []
        for device, buffer, offset in kept:
            self._write(device, [buffer], ByteOffset(offset))
        for device in {device for device, *_ in kept}:
            device.flush()


def publish_before_write(patch: pytest.MonkeyPatch) -> None:
    """Nothing is written before it has been published."""
    late = _Late(patch)

    def write_from(device: Device, buffers: Sequence[memoryview], offset: int) -> None:
        late.keep(device, buffers, offset)

    patch.setattr(Device, "write_from", write_from)


def header_after_publish(patch: pytest.MonkeyPatch) -> None:
    """Payloads are written and flushed as they should be; headers follow the publish."""
    late, write = _Late(patch), Device.write_from

    def payload_first(device: Device, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            if buffer.nbytes == ALIGN and bytes(buffer[: len(HEADER_MAGIC)]) == HEADER_MAGIC:
                late.keep(device, [buffer], offset)
            else:
                write(device, [buffer], ByteOffset(offset))
            offset += buffer.nbytes

    patch.setattr(Device, "write_from", payload_first)


def _open_lmdb_with(patch: pytest.MonkeyPatch, flag: str) -> None:
    """Open LMDB's environments with *flag* off."""
    right = lmdb.open
    patch.setattr(lmdb, "open", lambda *given, **more: right(*given, **{**more, flag: False}))


def lmdb_without_sync(patch: pytest.MonkeyPatch) -> None:
    """LMDB leaves it to the kernel when its file reaches the drive."""
    _open_lmdb_with(patch, "sync")


def lmdb_without_metasync(patch: pytest.MonkeyPatch) -> None:
    """Strict by name: the last commit hangs on the next one's sync."""
    _open_lmdb_with(patch, "metasync")


def reuse_before_certain(patch: pytest.MonkeyPatch) -> None:
    """Relaxed, and what a commit freed is written again before the commit is certain."""
    right = Metadata.submit

    def hasty(
        tables: Metadata, job: Any, after: Any = None, *, settled: Any = None, urgent: bool = False
    ) -> Any:
        if settled is None or settled is environment._nothing:
            return right(tables, job, after, settled=settled, urgent=urgent)

        def both(result: Any) -> None:
            if after is not None:
                after(result)
            settled(result)

        return right(tables, job, both, urgent=urgent)

    patch.setattr(Metadata, "submit", hasty)


def numbers_before_certain(patch: pytest.MonkeyPatch) -> None:
    """Relaxed, and generations are used before it is certain that they are never given again."""
    patch.setattr(Metadata, "settle", lambda _: None)


class _Early:
    """Evictions whose extents are free at once, and whose removal is committed later."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], Future[ledger.Removed]]] = []
        self._freed: set[int] = set()  # generations
        self._free = Core.free_space

    def submit(self, core: Core, wanted_bytes: int, **_: Any) -> "list[Future[ledger.Removed]]":
        """In the place of submit_eviction."""
        futures = []
        with core.lock, core.metadata.read() as view:
            for slot in choosing.choose_victims(core, wanted_bytes):
                key = core.slots.key_of(slot)
                block = view.block(key)
                assert block is not None
                gone = ledger.Removed(blocks=[(key, block)])
                self._free(core, gone)
                self._freed.add(block.generation)
                model = core.models[key.model]
                self._waiting.append(partial(core.submit_removal, model, [key], evicted=True))
                future: Future[ledger.Removed] = Future()
                future.set_result(gone)
                futures.append(future)
        return futures

    def free(self, core: Core, removed: ledger.Removed) -> None:
        """In the place of Core.free_space: nothing is freed twice."""
        late = [
            (key, block) for key, block in removed.blocks if block.generation not in self._freed
        ]
        self._free(core, ledger.Removed(blocks=late, limbo=removed.limbo))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """*call*, but first what waits is committed."""

        def caught_up(*given: Any, **more: Any) -> Any:
            waiting, self._waiting = self._waiting, []
            for removal in waiting:
                removal().result()
            return call(*given, **more)

        return caught_up


def free_before_commit(patch: pytest.MonkeyPatch) -> None:
    """What is evicted may be written again before its removal is committed."""
    early = _Early()

    def free_space(core: Core, removed: ledger.Removed) -> None:
        early.free(core, removed)

    patch.setattr(Core, "free_space", free_space)
    for module in (evicting, reserving):
        patch.setattr(module, "submit_eviction", early.submit)
    for owner, name in (
        (Put, "publish"), (evicting, "remove_session"), (evicting, "spoil"), (Warehouse, "check"),
    ):  # fmt: skip
        patch.setattr(owner, name, early.before(getattr(owner, name)))


BROKEN = {
    each.__name__: each
    for each in (
        no_flush, publish_before_write, header_after_publish, lmdb_without_sync,
        lmdb_without_metasync, free_before_commit, reuse_before_certain, numbers_before_certain,
    )
}  # fmt: skip


def rename_after_unlink(patch: pytest.MonkeyPatch) -> None:
    """A rename over a file takes that out first, in a commit of its own."""
    right = Files.rename

    def hasty(files: Files, parent: int, name: bytes, above: int, new: bytes, **more: Any) -> None:
        with suppress(NoSuchFile):
            files.unlink(above, new)
        right(files, parent, name, above, new, **more)

    patch.setattr(Files, "rename", hasty)


def name_before_bytes(patch: pytest.MonkeyPatch) -> None:
    """The row and the name of a file are committed before the blocks with its bytes."""
    right = FileBlocks.publish

    def hasty(blocks: FileBlocks, put: Put, row: Any, also: Any, then: Any) -> None:
        entered = blocks._core.metadata.submit(also).result()
        right(blocks, put, row, lambda _: entered, then)

    patch.setattr(FileBlocks, "publish", hasty)


BROKEN_FILES = {
    each.__name__: each
    for each in (no_flush, lmdb_without_sync, rename_after_unlink, name_before_bytes)
}
RELAXED_ONLY = frozenset({"reuse_before_certain", "numbers_before_certain"})
