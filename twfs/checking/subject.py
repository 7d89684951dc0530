"""What is checked: an open warehouse in use, or one that nobody has open, be it damaged or not.

The second needs no more than its metadata, its devices and its secret; it changes nothing in any of
them, takes no arrays into memory, and so opens what the daemon refuses. Blocks.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from twfs.core.opening import META_DIRECTORY
from twfs.core.state import Core
from twfs.devices.device import Device
from twfs.errors import CorruptMetadata, InvalidInput
from twfs.index import slots as states
from twfs.metadata.environment import Metadata
from twfs.records import Block, BlockKey
from twfs.secret import read_secret


@dataclass(frozen=True, slots=True)
class Subject:
    """A warehouse that nobody uses."""

    directory: Path
    uuid: UUID
    secret: bytes
    metadata: Metadata
    devices: Mapping[int, Device]

    @property
    def areas(self) -> Mapping[int, tuple[int, int]]:
        """Offset and length of the data area of every device, there or not."""
        return {index: device.data_area for index, device in self.devices.items()}

    def unchanged(self, key: BlockKey, block: Block) -> bool:
        """Tell whether the record is still the one that was looked at."""
        del key, block
        return True

    @contextmanager
    def enrolling_held(self) -> Iterator[None]:
        """Let nothing change in the roster during the block."""
        yield


@dataclass(frozen=True, slots=True)
class Live(Subject):
    """A warehouse in use: blocks come and go, and models are made, during a look at it."""

    core: Core

    @classmethod
    def of(cls, core: Core) -> "Live":
        """The warehouse that *core* is the state of."""
        return cls(core.directory, core.uuid, core.secret, core.metadata, core.devices, core)

    @property
    def areas(self) -> Mapping[int, tuple[int, int]]:
        """See Subject."""
        standings = self.core.standings.all
        return {index: each.record.data_area for index, each in standings.items()}

    def unchanged(self, key: BlockKey, block: Block) -> bool:
        """See Subject; a block that is being removed has changed."""
        with self.core.metadata.read() as view:
            now = view.block(key)
        if now is None or now.generation != block.generation or now.extents != block.extents:
            return False
        with self.core.lock:
            return bool(self.core.slots.state[block.slot] == states.LIVE)

    @contextmanager
    def enrolling_held(self) -> Iterator[None]:
        """See Subject."""
        with self.core.enrolling_held():
            yield


@contextmanager
def offline(directory: Path, *, read_only: bool = True) -> Iterator[Subject]:
    """Claim the warehouse in *directory*, as it is, for the block.

    NoSuchWarehouse, WarehouseBusy, FormatTooNew, FormatTooOld; CorruptMetadata where LMDB's file
    or what says which devices belong to it is damaged: a rebuild is all that helps then. A device
    that is not there or not ours is an error too, for its blocks would look lost: WrongDevice,
    CorruptSuperblock, TruncatedDevice.
    """
    with ExitStack() as undo:
        metadata = Metadata.open(directory / META_DIRECTORY, verified=True)
        undo.callback(metadata.close)
        warehouse = metadata.warehouse()
        devices: dict[int, Device] = {}
        for known in metadata.devices():
            device = Device.open(
                directory / known.path, warehouse=warehouse, device=known.uuid, index=known.index,
                read_only=read_only, either_copy=True,
            )  # fmt: skip
            undo.callback(device.close)
            devices[device.index] = device
        yield Subject(directory, warehouse, _secret(metadata, directory), metadata, devices)


def _secret(metadata: Metadata, directory: Path) -> bytes:
    """The secret, from the file beside the metadata if that has lost it."""
    try:
        return metadata.secret()
    except CorruptMetadata:
        try:
            return read_secret(directory)
        except InvalidInput:
            pass
        raise
