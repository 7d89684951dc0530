"""What the kernel knows of us (inodes, open files) and the verified payloads that reads come from.

No FUSE calls and no store calls in here. Everything belongs to the event loop's thread.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import trio

from twfs.errors import BlockGone, TooLarge
from twfs.store import BlockInfo
from twfs.units import Ino
from twfs.vfs.importing import PendingFile
from twfs.vfs.nodes import (
    CONTROL,
    LAYOUTS,
    METRICS,
    ROOT,
    STATISTICS,
    BlockFile,
    Node,
    Rows,
    SessionDirectory,
)

HANDLES_MAX: Final = 1 << 20  # the kernel's own limits on open files are lower
PAYLOAD_BYTES: Final = 256 << 20  # verified payloads kept: a few blocks of the largest models


class Known:
    """The nodes that the kernel may ask for by inode number, with its lookup counts."""

    def __init__(self) -> None:
        self._nodes: dict[Ino, Node] = {
            node.ino: node for node in (ROOT, CONTROL, LAYOUTS, STATISTICS, METRICS)
        }
        self._counts: dict[Ino, int] = {}
        self._sessions: dict[Ino, SessionDirectory] = {}
        self._opened: dict[Ino, BlockFile] = {}

    def statistics(self) -> dict[str, int]:
        """How much the kernel remembers."""
        return {
            "known_inodes": len(self._nodes),
            "known_sessions": len(self._sessions),
            "opened_blocks": len(self._opened),
        }

    def node(self, ino: int) -> Node:
        """The node with that inode; BlockGone if the kernel should not know it."""
        try:
            return self._nodes[Ino(ino)]
        except KeyError:
            raise BlockGone(f"no inode {ino}") from None

    def tell(self, node: Node) -> None:
        """Count a lookup: the kernel is told of *node*."""
        ino = node.ino
        self._nodes[ino] = node
        self._counts[ino] = self._counts.get(ino, 0) + 1
        if isinstance(node, SessionDirectory):
            self._sessions[ino] = node

    def opened(self, node: BlockFile) -> None:
        """Remember that the kernel may keep bytes of this block."""
        self._opened[node.ino] = node

    def forget(self, ino: int, lookups: int) -> None:
        """Take *lookups* back; with the last one the node is forgotten."""
        number = Ino(ino)
        left = self._counts.get(number, 0) - lookups
        if left > 0:
            self._counts[number] = left
            return
        self._counts.pop(number, None)
        self._sessions.pop(number, None)
        self._opened.pop(number, None)
        if number not in (ROOT.ino, CONTROL.ino, LAYOUTS.ino, STATISTICS.ino, METRICS.ino):
            self._nodes.pop(number, None)

    def perishable(self) -> list[SessionDirectory | BlockFile]:
        """Session directories that the kernel was told of, and blocks that it has read."""
        return [*self._sessions.values(), *self._opened.values()]

    def gone(self, node: SessionDirectory | BlockFile) -> None:
        """Stop watching *node*: the kernel was told to drop it."""
        self._sessions.pop(node.ino, None)
        self._opened.pop(node.ino, None)


@dataclass(slots=True)
class OpenBlock:
    """An open block file; *checked_at* is the number of changes when its life was last seen."""

    file: BlockFile
    info: BlockInfo
    checked_at: int


@dataclass(slots=True)
class OpenText:
    """An open file whose text was made at open."""

    text: bytes


@dataclass(slots=True)
class OpenPending:
    """An open file of a pending import."""

    file: PendingFile


@dataclass(slots=True)
class OpenDirectory:
    """An open directory; a second read from its beginning lists it anew."""

    node: Node
    rows: Rows
    uid: int
    begun: bool = False


Handle = OpenBlock | OpenText | OpenPending | OpenDirectory


class Handles:
    """Numbers for open files and directories."""

    def __init__(self) -> None:
        self._open: dict[int, Handle] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._open.values())

    def add(self, handle: Handle) -> int:
        """Number *handle*; TooLarge if far too many are open."""
        if len(self._open) >= HANDLES_MAX:
            raise TooLarge(f"{HANDLES_MAX} files are open")
        number = self._next
        self._next += 1
        self._open[number] = handle
        return number

    def get(self, number: int) -> Handle:
        """The handle of that number; BlockGone if it is closed."""
        try:
            return self._open[number]
        except KeyError:
            raise BlockGone(f"no open file {number}") from None

    def remove(self, number: int) -> None:
        """Close a handle; nothing if it is closed."""
        self._open.pop(number, None)


class Payloads:
    """Verified payloads, the last used up to *bytes_max*; each is read once, whoever asks.

    The payload read last stays however large it is, so that a block is never read twice for the
    requests that one reader makes of it.
    """

    def __init__(
        self, read: Callable[[BlockInfo], Awaitable[memoryview]], bytes_max: int = PAYLOAD_BYTES
    ) -> None:
        self._read = read
        self._bytes_max = bytes_max
        self._kept: OrderedDict[Ino, memoryview] = OrderedDict()
        self._bytes = 0
        self._reading: dict[Ino, trio.Event] = {}
        self._hits = 0
        self._reads = 0

    def statistics(self) -> dict[str, Any]:
        """Bytes kept, and how requests were served."""
        return {
            "payload_bytes": self._bytes,
            "payload_bytes_max": self._bytes_max,
            "payload_hits": self._hits,
            "payload_reads": self._reads,
        }

    def has(self, ino: Ino) -> bool:
        """Tell whether the payload is kept or being read."""
        return ino in self._kept or ino in self._reading

    def drop(self, ino: Ino) -> None:
        """Let go of a payload whose block is gone."""
        view = self._kept.pop(ino, None)
        self._bytes -= 0 if view is None else len(view)

    async def payload(self, info: BlockInfo) -> memoryview:
        """The whole payload; raises what the read raises."""
        ino = info.block.ino
        while True:
            kept = self._kept.get(ino)
            if kept is not None:
                self._kept.move_to_end(ino)
                self._hits += 1
                return kept
            reading = self._reading.get(ino)
            if reading is None:
                break
            await reading.wait()
        done = self._reading[ino] = trio.Event()
        try:
            self._reads += 1
            view = await self._read(info)
            self._keep(ino, view)
        finally:
            del self._reading[ino]
            done.set()
        return view

    def _keep(self, ino: Ino, view: memoryview) -> None:
        self._kept[ino] = view
        self._bytes += len(view)
        while self._bytes > self._bytes_max and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= len(old)
