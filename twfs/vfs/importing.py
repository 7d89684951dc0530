"""Import through the mount: pending directories whose files come in any order, and their spool.

A pending directory is named by the head of the chain that it will hold. Bytes wait in an unlinked
spool file; at the close after which `chain.json` and all the files it lists are there and verified,
they go through Store.put like anybody's. Methods block on the spool's disk and on commits, so they
belong in worker threads; a lock per pending directory makes them safe there.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from twfs.checksums import xxh3_of
from twfs.errors import (
    BlockGone,
    DeviceError,
    DigestMismatch,
    InvalidInput,
    NoSpaceForImage,
    NoSuchBlock,
    NotAllowed,
    TooLarge,
    TwfsError,
    WarehouseFull,
)
from twfs.index.clocks import wall_ms
from twfs.prefix import Names
from twfs.store import Model, ModelInfo, PutOutcome, Store
from twfs.tenants import Tenants
from twfs.units import ByteCount, Ino, ModelId, PrefixHash
from twfs.vfs.chainfile import CHAIN_BYTES_MAX, CHAIN_NAME, ChainBlock, ChainFile, parse_block_name
from twfs.vfs.spool import Spool

log = logging.getLogger(__name__)

PENDING_INOS: Final = 1 << 58  # inodes of pending directories and files count from here
PENDINGS_MAX: Final = 64  # each holds a descriptor and a spool; nobody copies more at a time
FILES_MAX: Final = 1 << 20  # of one pending directory; a million blocks is 16 M tokens at least
SPOOL_BYTES_MAX: Final = 256 << 30  # of all pendings; one session of a 70B model is 40 GiB
SPOOL_FREE_MIN: Final = 256 << 20  # left on the metadata's filesystem: a commit must never lack it
WINDOW_BYTES: Final = 256 << 20  # of payloads put at a time; each put costs one commit
IDLE_SECONDS: Final = 600.0  # a pending directory that nobody wrote to is dropped


class PendingState(Enum):
    """What has become of a pending directory."""

    OPEN = "open"
    PUBLISHED = "published"
    DROPPED = "dropped"


class PendingFile:
    """One file of a pending directory."""

    __slots__ = ("changed_ms", "dirty", "ino", "name", "pending", "region", "size", "text",
                 "verified")  # fmt: skip

    def __init__(self, pending: "Pending", name: str, ino: Ino) -> None:
        self.pending = pending
        self.name = name
        self.ino = ino
        self.size = 0
        self.region: int | None = None
        self.text: bytearray | None = bytearray() if is_chain_name(name) else None
        self.changed_ms = wall_ms()
        self.dirty = False  # written since it was last closed
        self.verified = False


def is_chain_name(name: str) -> bool:
    """Tell whether *name* is chain.json, or what rsync calls it while it comes."""
    return name == CHAIN_NAME or name.startswith(f".{CHAIN_NAME}.")


class Pending:
    """One pending directory; see the module's docstring. Made by `Importer.open`."""

    def __init__(
        self, model: ModelInfo, head: PrefixHash, ino: Ino, spool: Spool, *, uid: int = 0
    ) -> None:
        self.model = model
        self.head = head
        self.ino = ino
        self.uid = uid  # who made it: the only one to see it, but for operators
        self.state = PendingState.OPEN
        self.files: dict[str, PendingFile] = {}
        self.chain: ChainFile | None = None
        self.changed_ms = wall_ms()
        self.used_at = time.monotonic()
        self.bytes = 0
        self._spool = spool
        self._lock = threading.RLock()
        self._limit = max(model.layout.block_bytes(i) for i in range(len(model.layout.groups)))

    # Files

    def add(self, name: str, ino: Ino) -> PendingFile:
        """Make the empty file *name*; InvalidInput if the chain could not have one of that name."""
        with self._lock:
            self._check_open()
            base = name
            if name.startswith(".") and len(name) > 8 and name[-7] == ".":
                base = name[1:-7]  # `.00000.kv.Ab3dEf`: what rsync calls a file while it comes
            if base != CHAIN_NAME and parse_block_name(base, self.model.layout) is None:
                raise InvalidInput(
                    f"{name!r} cannot be in a session of {self.model.name}: import files named "
                    f"as the mount names them (00000.kv, chain.json)"
                )
            if len(self.files) >= FILES_MAX:
                raise TooLarge(f"an import holds at most {FILES_MAX} files")
            file = PendingFile(self, name, ino)
            self.files[name] = file
            return file

    def remove(self, name: str) -> None:
        """Take the file *name* out; NoSuchBlock."""
        with self._lock:
            self._check_open()
            file = self.files.pop(name, None)
            if file is None:
                raise NoSuchBlock(f"no file {name!r} in the import of {self.head.hex()}")
            if file.region is not None:
                self._spool.give_back(file.region)
                file.region = None
            self.bytes -= file.size
            file.size = 0
            if name == CHAIN_NAME:
                self.chain = None

    def rename(self, old: str, new: str) -> None:
        """Give the file *old* the name *new*, in place of what has it."""
        with self._lock:
            file = self.files.get(old)
            if file is None:
                raise NoSuchBlock(f"no file {old!r} in the import of {self.head.hex()}")
            if old == new:
                return
            if new in self.files:
                self.remove(new)
            moved = self.add(new, file.ino)
            if (moved.text is None) != (file.text is None):
                del self.files[new]
                raise InvalidInput(f"{old!r} cannot be renamed to {new!r}: one of them is a block")
            del self.files[old]
            file.name, file.verified = new, False
            self.files[new] = file

    def write(self, file: PendingFile, offset: int, data: bytes | memoryview) -> None:
        """Write at any *offset*; InvalidInput beyond what a block of the layout has."""
        with self._lock:
            self._check_open()
            self.used_at = time.monotonic()
            end = offset + len(data)
            self._check_size(file, end)
            if file.text is not None:
                file.text.extend(bytes(max(0, end - len(file.text))))
                file.text[offset:end] = data
            else:
                if file.region is None:
                    file.region = self._spool.take()
                self._spool.write(file.region, offset, data, file.size)
            file.dirty, file.verified = True, False
            self._set_size(file, max(file.size, end))

    def truncate(self, file: PendingFile, size: int) -> None:
        """Make *file* *size* bytes long; new ones are zeros."""
        with self._lock:
            self._check_open()
            self._check_size(file, size)
            if file.text is not None:
                del file.text[size:]
                file.text.extend(bytes(size - len(file.text)))
            elif size > file.size:
                if file.region is None:
                    file.region = self._spool.take()
                self._spool.write(file.region, size, b"", file.size)
            file.verified = False
            self._set_size(file, size)

    def read(self, file: PendingFile, offset: int, size: int) -> bytes:
        """Return what was written so far; BlockGone once the import is over."""
        with self._lock:
            self._check_open()
            size = max(0, min(size, file.size - offset))
            if file.text is not None:
                return bytes(file.text[offset : offset + size])
            return (
                bytes(size) if file.region is None else self._spool.read(file.region, offset, size)
            )

    def _check_open(self) -> None:
        if self.state is not PendingState.OPEN:
            raise BlockGone(f"the import of {self.head.hex()} is over: it was {self.state.value}")

    def _check_size(self, file: PendingFile, size: int) -> None:
        limit = self._limit if file.text is None else CHAIN_BYTES_MAX
        if size > limit:
            raise InvalidInput(
                f"{file.name} of {size} bytes: in {self.model.name} it has at most {limit}"
            )

    def _set_size(self, file: PendingFile, size: int) -> None:
        self.bytes += size - file.size
        file.size = size

    def close(self, state: PendingState) -> None:
        """End the import with *state*; idempotent."""
        with self._lock:
            if self.state is PendingState.OPEN:
                self.state = state
                self._spool.close()
                for file in self.files.values():
                    file.text = None
                if state is PendingState.DROPPED:
                    self.files = {}

    # Verification

    def settle(self, file: PendingFile, publish: "Callable[[Pending, ChainFile], None]") -> None:
        """Verify what is there; call *publish* once all is. Any error drops the whole import.

        Nothing is judged while it is still being written, except *file* if it was just closed.
        """
        with self._lock:
            if self.state is not PendingState.OPEN or file.name.startswith("."):
                return
            self.used_at = time.monotonic()
            wrote, file.dirty = file.dirty, False
            if file.name == CHAIN_NAME and file.size and not file.verified:
                self.chain = ChainFile.parse(bytes(file.text or b""))
                self.chain.check(self.model, self.head)
                file.verified = True
            if self.chain is None:
                return
            if wrote and file.name != CHAIN_NAME:
                wanted = self.chain.files.get(file.name)
                if wanted is None:
                    raise InvalidInput(f"{file.name} is not in the chain.json of this import")
                if file.size < wanted.bytes:
                    return  # a process that forked closes files that its parent still writes
            if self._complete(self.chain, file):
                publish(self, self.chain)
                self.close(PendingState.PUBLISHED)

    def _complete(self, chain: ChainFile, closed: PendingFile) -> bool:
        """Tell whether all files are there, each verified against its line of chain.json."""
        complete = True
        for name, wanted in chain.files.items():
            file = self.files.get(name)
            if file is None or (file.dirty and file is not closed) or file.size < wanted.bytes:
                complete = False
            elif not file.verified:
                self._verify(file, wanted)
        return complete

    def _verify(self, file: PendingFile, wanted: ChainBlock) -> None:
        if file.size != wanted.bytes:
            raise InvalidInput(f"{file.name} has {file.size} bytes; chain.json says {wanted.bytes}")
        if xxh3_of(self.read(file, 0, file.size)).hex() != wanted.xxh3:
            raise InvalidInput(f"{file.name} does not have the checksum that chain.json states")
        file.verified = True


class Importer:
    """All pending directories of one warehouse."""

    def __init__(
        self, store: Store, spool_directory: Path, *, spool_bytes_max: int = SPOOL_BYTES_MAX,
        tenants: Callable[[], Tenants] = Tenants,
    ) -> None:  # fmt: skip
        self._store = store
        self._tenants = tenants
        self._directory = spool_directory
        self._bytes_max = spool_bytes_max
        self._pendings: dict[tuple[ModelId, PrefixHash], Pending] = {}
        self._lock = threading.Lock()
        self._next_ino = PENDING_INOS
        self._published = 0
        self._dropped = 0
        self._imported_blocks = 0

    def statistics(self) -> dict[str, Any]:
        """What is pending, and what became of earlier imports."""
        pendings = list(self._pendings.values())
        return {
            "pending": len(pendings),
            "pending_bytes": sum(pending.bytes for pending in pendings),
            "published": self._published,
            "dropped": self._dropped,
            "blocks": self._imported_blocks,
        }

    def pending(self, model: ModelId, head: PrefixHash) -> Pending | None:
        """The pending directory of that name."""
        return self._pendings.get((model, head))

    def pendings(self, model: ModelId) -> list[Pending]:
        """All pending directories of *model*, in order of their names."""
        mine = [pending for pending in list(self._pendings.values()) if pending.model.id == model]
        return sorted(mine, key=lambda pending: pending.head)

    def _ino(self) -> Ino:
        with self._lock:
            self._next_ino += 1
            return Ino(self._next_ino)

    def open(self, model: ModelInfo, head: PrefixHash, *, uid: int = 0) -> Pending:
        """Open a pending directory of *uid*; InvalidInput if there is one, TooLarge if many."""
        if len(self._pendings) >= PENDINGS_MAX:
            raise TooLarge(f"{PENDINGS_MAX} imports are pending: finish or remove some first")
        own = sum(pending.uid == uid for pending in list(self._pendings.values()))
        if own >= PENDINGS_MAX // 2 and uid not in self._tenants().operators:
            raise TooLarge(f"{own} imports of uid {uid} are pending: finish or remove some first")
        layout = model.layout
        region = max(layout.block_bytes(group) for group in range(len(layout.groups)))
        pending = Pending(model, head, self._ino(), Spool(self._directory, region), uid=uid)
        with self._lock:
            if (model.id, head) not in self._pendings:
                self._pendings[model.id, head] = pending
                return pending
        pending.close(PendingState.DROPPED)
        raise InvalidInput(f"{head.hex()} is being imported already")

    def create(self, pending: Pending, name: str) -> PendingFile:
        """Make an empty file in *pending*."""
        return pending.add(name, self._ino())

    def write(self, file: PendingFile, offset: int, data: bytes | memoryview) -> None:
        """As Pending.write, within the bounds of the spool: NoSpaceForImage beyond them."""
        held = sum(pending.bytes for pending in list(self._pendings.values()))
        disk = os.statvfs(self._directory)
        free = disk.f_bavail * disk.f_frsize
        if held + len(data) > self._bytes_max or free - len(data) < SPOOL_FREE_MIN:
            raise NoSpaceForImage(
                f"imports hold {held} bytes of at most {self._bytes_max}, and {self._directory} "
                f"has {free} free: make room there or import fewer sessions at a time"
            )
        file.pending.write(file, offset, data)

    def truncate(self, file: PendingFile, size: int) -> None:
        """As Pending.truncate."""
        file.pending.truncate(file, size)

    def rename(self, pending: Pending, old: str, new: str) -> None:
        """Rename inside *pending*; the name that was lacking may complete it."""
        pending.rename(old, new)
        self.settle(pending.files[new])

    def settle(self, file: PendingFile) -> None:
        """A file was closed: verify, and publish what is complete. An error drops it all."""
        pending = file.pending
        try:
            pending.settle(file, self._publish)
        except TwfsError as error:
            log.warning("import of %s dropped: %s", pending.head.hex(), error)
            self.drop(pending)
            raise
        if pending.state is PendingState.PUBLISHED:
            self._forget(pending)

    def drop(self, pending: Pending) -> None:
        """Give *pending* up and everything in it; idempotent."""
        pending.close(PendingState.DROPPED)
        if self._forget(pending):
            self._dropped += 1

    def _forget(self, pending: Pending) -> bool:
        with self._lock:
            key = (pending.model.id, pending.head)
            if self._pendings.get(key) is not pending:
                return False
            del self._pendings[key]
            return True

    def drop_idle(self, *, idle_seconds: float = IDLE_SECONDS) -> int:
        """Drop what nobody has written to for *idle_seconds*; return how many."""
        late = time.monotonic() - idle_seconds
        idle = [pending for pending in list(self._pendings.values()) if pending.used_at <= late]
        for pending in idle:
            log.warning("import of %s dropped: abandoned", pending.head.hex())
            self.drop(pending)
        return len(idle)

    def close(self) -> None:
        """Drop all that is pending."""
        for pending in list(self._pendings.values()):
            self.drop(pending)

    # Publishing

    def _publish(self, pending: Pending, chain: ChainFile) -> None:
        """Put every block, in windows: first blocks first, all groups and shards of each.

        They belong to the tenant that chain.json names; NotAllowed if it is none of the importer's.
        """
        tenants = self._tenants()
        if not tenants.may_import(pending.uid, chain.tenant):
            raise NotAllowed(
                f"uid {pending.uid} may not import for a tenant {chain.tenant!r}, or there is none"
            )
        model = self._store.open_model(pending.model.name, tenant=chain.tenant)
        if model.id != pending.model.id:
            raise InvalidInput(f"{model.name} opened epoch {model.epoch} during the import")
        for window in windows(chain, WINDOW_BYTES):
            ordered = sorted(window, key=lambda block: (block.group, block.shard, block.index))
            for _, run in groupby(
                ordered,
                key=lambda block: (block.group, block.shard, block.retention, not block.key),
            ):
                self._put(model, pending, list(run), chain.public)
        self._published += 1
        self._imported_blocks += len(chain.blocks)

    def _put(self, model: Model, pending: Pending, run: list[ChainBlock], public: int) -> None:
        files = [pending.files[block.file] for block in run]
        payloads = [pending.read(file, 0, file.size) for file in files]
        names = Names(
            b"".join(bytes.fromhex(block.hash) for block in run),
            b"".join(bytes.fromhex(block.digest) for block in run),
            b"".join(bytes.fromhex(block.parent) for block in run),
            tuple(block.position for block in run),
            tuple(bytes.fromhex(block.key) for block in run) if run[0].key else (),
            sum(block.index < public for block in run),
        )
        result = self._store.put(
            model, names, payloads, group=run[0].group, shard=run[0].shard,
            retention=run[0].retention,
        )  # fmt: skip
        if result.held == len(run):
            return
        block, outcome = run[result.held], result.outcomes[result.held]
        if outcome in {PutOutcome.NO_ROOM, PutOutcome.OVER_QUOTA}:
            raise WarehouseFull(f"no room for {block.file} and what follows: evict or remove some")
        if outcome is PutOutcome.COLLISION:
            raise DigestMismatch(f"{block.file}: {block.hash} is there with another digest")
        raise DeviceError(f"{block.file} did not reach the device: see `twfs status`")


def windows(chain: ChainFile, byte_count: int) -> Iterator[list[ChainBlock]]:
    """Cut *chain* between blocks into parts of about *byte_count*, whole blocks in each."""
    window: list[ChainBlock] = []
    size = ByteCount(0)
    for _, rows in groupby(
        sorted(chain.blocks, key=lambda block: block.index), key=lambda block: block.index
    ):
        for block in rows:
            window.append(block)
            size = ByteCount(size + block.bytes)
        if size >= byte_count:
            yield window
            window, size = [], ByteCount(0)
    if window:
        yield window
