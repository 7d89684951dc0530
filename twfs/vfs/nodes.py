"""The kinds of files and directories that a mount shows, and their inode numbers.

What they mean is tree.py's. Immutable values, any thread; Rows belongs to one thread.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from twfs.layout import FILES_NAME
from twfs.records import BlockKey
from twfs.store import BlockInfo, ModelInfo
from twfs.units import Ino, Millis, ModelId, PrefixHash
from twfs.vfs.importing import Pending, PendingFile

# Ranges of inode numbers, so that no table is needed to keep them apart. Blocks have those below
# 1 << 57; pending imports have 1 << 58 (importing.py).
SESSION_INOS: Final = 1 << 62  # | inode of the block that the directory ends with
CHAIN_INOS: Final = 1 << 61  # | the same
MODEL_INOS: Final = 1 << 60  # | model
CONTROL_INOS: Final = 1 << 59
FILE_INOS: Final = 1 << 57  # | inode of a file; 0 is the root of their tree
SECOND: Final = 1 << 32  # in two ranges: a second thing per model
ROOT_INO: Final = Ino(1)

CONTROL_NAME: Final = ".twfs"
LAYOUTS_NAME: Final = "layouts"
DETACHED_NAME: Final = "detached"
STATISTICS_NAME: Final = "stats.json"
METRICS_NAME: Final = "metrics"


class Chain:
    """The blocks of one session directory, as they were when *changes* was the number of changes.

    *text* is chain.json, made when first asked for.
    """

    __slots__ = ("changes", "infos", "places", "text")

    def __init__(self, infos: list[BlockInfo], changes: int) -> None:
        self.infos = infos
        self.changes = changes
        self.text: bytes | None = None
        self.places = {
            (info.index, info.key.group, info.key.shard): place for place, info in enumerate(infos)
        }


@dataclass(frozen=True, slots=True)
class Directory:
    """The root, `.twfs` or `.twfs/layouts`."""

    name: str
    ino: Ino


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """`/<model>`: its sessions, and `detached`."""

    model: ModelId
    ino: Ino


@dataclass(frozen=True, slots=True)
class DetachedDirectory:
    """`/<model>/detached`."""

    model: ModelId
    ino: Ino


@dataclass(frozen=True, slots=True)
class SessionDirectory:
    """`/<model>/<prefix hash>`: a head, or any other known prefix."""

    model: ModelId
    head: PrefixHash
    ino: Ino


@dataclass(frozen=True, slots=True)
class ChainText:
    """`chain.json` of a session directory."""

    session: SessionDirectory
    ino: Ino


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A block's file. The place says in which directory it was met last, for reading ahead."""

    key: BlockKey
    ino: Ino
    session: SessionDirectory | None = field(default=None, compare=False)
    place: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file under `.twfs`; *model* for a layout."""

    name: str
    ino: Ino
    model: ModelId | None = None


Node = (
    Directory | ModelDirectory | DetachedDirectory | SessionDirectory | ChainText | BlockFile
    | ControlFile | Pending | PendingFile
)  # fmt: skip

ROOT: Final = Directory("", ROOT_INO)
CONTROL: Final = Directory(CONTROL_NAME, Ino(CONTROL_INOS | 1))
FILES: Final = Directory(FILES_NAME, Ino(FILE_INOS))
LAYOUTS: Final = Directory(LAYOUTS_NAME, Ino(CONTROL_INOS | 2))
STATISTICS: Final = ControlFile(STATISTICS_NAME, Ino(CONTROL_INOS | 3))
METRICS: Final = ControlFile(METRICS_NAME, Ino(CONTROL_INOS | 4))
DIRECTORIES: Final = (
    Directory, ModelDirectory, DetachedDirectory, SessionDirectory, Pending,
)  # fmt: skip


class Attributes(NamedTuple):
    """What stat shows of a node; *owner* is the user whose alone it is, if the mount's is not."""

    ino: Ino
    links: int
    size: int
    device_bytes: int
    modified_ms: Millis
    used_ms: Millis
    owner: int | None = None


class Row(NamedTuple):
    """One name of a directory."""

    name: str
    node: Node
    attributes: Attributes


class Rows:
    """The names of one opened directory; the number of a name keeps its meaning."""

    def __init__(self, source: Iterator[Any], make: Callable[[Any], Row | None]) -> None:
        self._source = source
        self._make = make
        self._seen: list[Any] = []

    def since(self, number: int) -> Iterator[tuple[int, Row]]:
        """Yield each row from *number* on, with the number of the next; skip what has gone."""
        while True:
            while number >= len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            row = self._make(self._seen[number])
            number += 1
            if row is not None:
                yield number, row


def layout_file(model: ModelId, info: ModelInfo) -> ControlFile:
    """The file under `.twfs/layouts` of one model."""
    return ControlFile(info.name, Ino(CONTROL_INOS | SECOND | model), model)


def attributes_of(info: BlockInfo, owner: int | None) -> Attributes:
    """The attributes of a block's file."""
    block = info.block
    return Attributes(
        block.ino, info.links, block.payload_bytes, block.device_bytes, block.published_ms,
        max(info.last_use_ms, block.published_ms), owner,
    )  # fmt: skip


def directory_attributes(ino: Ino, info: BlockInfo, owner: int | None) -> Attributes:
    """The attributes of a session's directory."""
    published = info.block.published_ms
    return Attributes(ino, 1, 0, 0, published, max(info.last_use_ms, published), owner)
