"""After every change: take from the kernel what it may keep but is not there any more.

Also drops abandoned imports. Runs in the event loop; only calls that may wait go to threads.
"""

import errno
import logging
from typing import Final

import pyfuse3  # noqa: TID251
import trio

from twfs.errors import TwfsError
from twfs.store import Namespace
from twfs.vfs.importing import Importer
from twfs.vfs.nodes import BlockFile, SessionDirectory
from twfs.vfs.tree import Tree
from twfs_mount.handles import Known, Payloads

log = logging.getLogger(__name__)

WATCH_SECONDS: Final = 0.2  # how old a name that has gone may be
WATCH_STEP: Final = 256  # directories and open blocks looked at in one go: about 10 ms
IDLE_CHECK_SECONDS: Final = 15.0


class Watcher:
    """See the module's docstring."""

    def __init__(
        self, namespace: Namespace, tree: Tree, importer: Importer, known: Known,
        payloads: Payloads,
    ) -> None:  # fmt: skip
        self._namespace = namespace
        self._tree = tree
        self._importer = importer
        self._known = known
        self._payloads = payloads
        self._invalidated = 0

    def statistics(self) -> dict[str, int]:
        """How many directories and blocks were taken from the kernel."""
        return {"invalidated": self._invalidated}

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._drop_idle)

    async def _drop_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_CHECK_SECONDS)
            await trio.to_thread.run_sync(self._importer.drop_idle)

    async def _watch(self) -> None:
        """After every change, look at what the kernel may keep, a bounded part at a time."""
        seen: int | None = None
        while True:
            await trio.sleep(WATCH_SECONDS)
            changes = self._namespace.changes()
            if changes == seen:
                continue
            seen = changes
            perishable = self._known.perishable()
            for start in range(0, len(perishable), WATCH_STEP):
                for node in perishable[start : start + WATCH_STEP]:
                    await self._look_at(node)
                await trio.lowlevel.checkpoint()

    async def _look_at(self, node: SessionDirectory | BlockFile) -> None:
        """Take *node* from the kernel if its block is not there any more."""
        try:
            if isinstance(node, SessionDirectory):
                self._tree.session_block(node)
            else:
                self._tree.block(node)
        except TwfsError:
            self._known.gone(node)
            self._invalidated += 1
            if isinstance(node, SessionDirectory):
                model = self._tree.model_directory(node.model)
                pyfuse3.invalidate_entry_async(
                    pyfuse3.InodeT(model.ino), node.head.hex().encode(), ignore_enoent=True
                )
                return
            self._payloads.drop(node.ino)
            try:
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, pyfuse3.InodeT(node.ino))
            except OSError as error:
                if error.errno != errno.ENOENT:  # the kernel has forgotten it already
                    log.warning("inode %d cannot be invalidated: %s", node.ino, error)
