"""Making a device of a warehouse, and what comes before that: claiming it, seeing what it carries.

All calls block. Reading and writing an existing device is device.py's business.
"""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from twfs.errors import (
    CorruptSuperblock,
    DeviceError,
    DeviceInUse,
    FormatTooNew,
    FormatTooOld,
    InvalidInput,
    NoSpaceForImage,
    NotAllowed,
    ReadOnly,
    TwfsError,
    WarehouseBusy,
    WrongDevice,
)
from twfs.records import DATA_START, FORMAT_VERSION, Superblock
from twfs.units import ALIGN, ByteCount, DeviceIndex, Millis

DEVICE_BYTES_MIN: Final = 16 << 20  # below that the superblocks' megabytes are most of the device
BLKDISCARD: Final = 0x1277
BLKSSZGET: Final = 0x1268
BLKROGET: Final = 0x125E
BLKID_SECONDS_MAX: Final = 10.0  # a dying device must not hold up `twfs create` for ever
PROBE_BYTES: Final = 128 << 10  # every signature that we know lies in here
# Magic bytes that tell what a device carries, for machines without blkid: (offset, bytes, words).
SIGNATURES: Final = (
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    (0, b"XFSB", "an xfs filesystem"),
    (0x10040, b"_BHRfS_M", "a btrfs filesystem"),
    (0, b"LUKS\xba\xbe", "an encrypted LUKS volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (0, b"LABELONE", "an LVM physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an md RAID"),
    (4086, b"SWAPSPACE2", "a swap area"),
    (4086, b"SWAP-SPACE", "a swap area"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "an MBR partition table or a boot sector"),
)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device to be made: an image file of *size_bytes*, or what is at *path* used whole."""

    path: Path
    size_bytes: ByteCount | None = None


def refusal(path: Path, error: OSError) -> TwfsError:
    """Turn the OSError of an open into the error that says what to do."""
    match error.errno:
        case errno.EBUSY | errno.ETXTBSY | errno.EAGAIN:
            return WarehouseBusy(
                f"{path} is in use by another process (a twfs daemon, a mounted filesystem, LVM): "
                "stop that first, or name another device"
            )
        case errno.EACCES | errno.EPERM:
            return NotAllowed(f"{path} may not be opened: run as root or as a member of its group")
        case errno.EROFS:
            return ReadOnly(f"{path} is read-only: its filesystem or the device refuses writes")
        case errno.ENOENT | errno.ENOTDIR | errno.ENXIO | errno.ENODEV:
            return WrongDevice(f"{path} is not there: check the path and that the drive is present")
        case errno.EINVAL:
            return InvalidInput(
                f"{path} cannot be opened with O_DIRECT: use a block device, or an image file on "
                "ext4 or xfs"
            )
        case _:
            return DeviceError(f"{path} cannot be opened: {error.strerror}")


def claim(path: Path, *, read_only: bool = False) -> tuple[int, bool]:
    """Open *path* as its only user; returns the descriptor, and whether it is a block device.

    Readers claim too: nobody may write below them.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        before = path.stat()
        if not (stat.S_ISBLK(before.st_mode) or stat.S_ISREG(before.st_mode)):
            raise InvalidInput(f"{path} is neither a block device nor a file")
        descriptor = os.open(path, access | os.O_DIRECT | os.O_CLOEXEC | os.O_EXCL)
    except OSError as error:
        raise refusal(path, error) from error
    try:
        is_block = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        if not is_block:  # O_EXCL claims block devices only
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sector = fcntl.ioctl(descriptor, BLKSSZGET, bytes(4)) if is_block else bytes(4)
        if int.from_bytes(sector, "little") > ALIGN:
            raise InvalidInput(f"{path} has sectors larger than {ALIGN} bytes: it cannot be used")
    except OSError as error:
        os.close(descriptor)
        raise refusal(path, error) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, is_block


def refuses_writes(descriptor: int) -> bool:
    """Tell whether a block device is set read-only; it can be opened for writing all the same."""
    answer = fcntl.ioctl(descriptor, BLKROGET, bytes(4))
    return int.from_bytes(answer, "little") != 0


def superblock_at(descriptor: int, offset: int) -> Superblock | str:
    """Return the superblock at *offset*, or what is wrong with it."""
    with mmap.mmap(-1, ALIGN) as buffer:
        try:
            count = os.preadv(descriptor, [buffer], offset)
            return Superblock.unpack(bytes(buffer[:count]))
        except (OSError, ValueError) as error:
            return str(error)


def read_superblock(path: Path, descriptor: int, notes: list[str]) -> Superblock:
    """Return the first copy that is whole, and note if it is the last one."""
    last_offset = max(usable_bytes(descriptor) - ALIGN, 0)
    first, last = superblock_at(descriptor, 0), superblock_at(descriptor, last_offset)
    superblock = last if isinstance(first, str) else first
    if isinstance(superblock, str):
        raise CorruptSuperblock(
            f"{path} has no whole superblock (first: {first}; last: {last}): it is no device of "
            "twfs, or must be restored"
        )
    if superblock.version < FORMAT_VERSION:
        raise FormatTooOld(
            f"{path} has format version {superblock.version}, and this twfs reads {FORMAT_VERSION} "
            "only: create the warehouse anew"
        )
    if superblock.version > FORMAT_VERSION:
        raise FormatTooNew(
            f"{path} has format version {superblock.version}, and this twfs knows up to "
            f"{FORMAT_VERSION}: upgrade twfs"
        )
    if isinstance(first, str):
        notes.append(f"first superblock copy is corrupt; the copy at offset {last_offset} is used")
    return superblock


def usable_bytes(descriptor: int) -> int:
    """Size of the device, rounded down to 4 KiB."""
    return os.lseek(descriptor, 0, os.SEEK_END) // ALIGN * ALIGN


def inspect(path: Path) -> str | None:
    """Say in words what the device or file at *path* carries already; None if nothing is known.

    Works without blkid, which is asked for what we do not recognise. WrongDevice or NotAllowed if
    it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = usable_bytes(descriptor)
            head = os.pread(descriptor, PROBE_BYTES, 0)
            tail = os.pread(descriptor, ALIGN, max(end - ALIGN, 0))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal(path, error) from error
    for data in (head[:ALIGN], tail):
        with suppress(ValueError):
            return f"a device of twfs warehouse {Superblock.unpack(data).warehouse}"
    for offset, magic, words in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return words
    return _ask_blkid(path)


def _ask_blkid(path: Path) -> str | None:
    """What blkid makes of *path*; None if it knows nothing, is not installed or does not answer."""
    program = shutil.which("blkid", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        return None
    command = [program, "-p", "-o", "export", str(path.absolute())]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=BLKID_SECONDS_MAX
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = dict(line.split("=", maxsplit=1) for line in answer.stdout.splitlines() if "=" in line)
    if "TYPE" in found:
        return f"{found['TYPE']} ({found.get('USAGE', 'unknown use')})"
    return f"a {found['PTTYPE']} partition table" if "PTTYPE" in found else None


def format_device(
    spec: DeviceSpec, *, warehouse: UUID, index: DeviceIndex, force: bool = False
) -> Superblock:
    """Make the device of *spec* number *index* of *warehouse*; its superblock is written last.

    With *force*, whatever is there is lost. DeviceInUse if it carries something, WarehouseBusy if
    somebody has it open, NoSpaceForImage, and InvalidInput below 16 MiB; a file made here is
    removed when anything fails.
    """
    wanted = spec.size_bytes
    if wanted is not None and wanted < DEVICE_BYTES_MIN:
        raise InvalidInput(
            f"{spec.path} would have {wanted} bytes: a device needs {DEVICE_BYTES_MIN} (16 MiB)"
        )
    created = wanted is not None and _create_file(spec.path)
    try:
        descriptor, is_block = claim(spec.path)
        try:
            size = _sized(descriptor, spec, is_block=is_block, force=force)
            return _write_superblocks(descriptor, size, warehouse, index, is_block=is_block)
        except OSError as error:
            raise DeviceError(
                f"{spec.path} cannot be formatted: {error.strerror}; replace the drive"
            ) from error
        finally:
            os.close(descriptor)
    except BaseException:
        if created:
            spec.path.unlink(missing_ok=True)
        raise


def _create_file(path: Path) -> bool:
    """Make an empty file, for its owner only, unless there is something; tells whether it did."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileExistsError:
        return False
    except OSError as error:
        raise refusal(path, error) from error
    try:
        os.fsync(directory)  # or a power cut may take the name of a full device
    finally:
        os.close(directory)
    return True


def _sized(descriptor: int, spec: DeviceSpec, *, is_block: bool, force: bool) -> int:
    """Return the bytes to use, after making sure that they may be overwritten and are allocated."""
    path, held = spec.path, os.lseek(descriptor, 0, os.SEEK_END)
    if is_block and spec.size_bytes is not None:
        raise InvalidInput(f"{path} is a block device, used whole: leave the size out")
    size = (held if spec.size_bytes is None else spec.size_bytes) // ALIGN * ALIGN
    if size < DEVICE_BYTES_MIN:
        raise InvalidInput(
            f"{path} has {size} usable bytes: a device needs {DEVICE_BYTES_MIN} (16 MiB)"
        )
    carried = inspect(path) if held else None
    if carried is None and not is_block and held and not _is_blank(path):
        carried = "data of an unknown kind"
    if carried is None and held and spec.size_bytes is not None:
        carried = f"{held} bytes already"
    if carried is not None and not force:
        raise DeviceInUse(
            f"{path} carries {carried}: name another device, or force it, which loses all of that"
        )
    if not is_block:
        room = os.fstatvfs(descriptor)
        free = room.f_bavail * room.f_frsize
        # Asked first, or it would be full for a moment, and others' writes would fail.
        try:
            if size - os.fstat(descriptor).st_blocks * 512 > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # A write to a published image must never find the filesystem full.
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.ftruncate(descriptor, held)
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            raise NoSpaceForImage(
                f"{path} needs {size} bytes and its filesystem has {free} free: ask for less, or "
                "use another filesystem"
            ) from error
        if spec.size_bytes is not None:
            os.ftruncate(descriptor, size)
    return size


def _is_blank(path: Path) -> bool:
    """Tell whether the first megabyte of a file is zeros, as in one made to be an image."""
    with path.open("rb") as file:
        return not any(file.read(DATA_START))


def _write_superblocks(
    descriptor: int, size: int, warehouse: UUID, index: DeviceIndex, *, is_block: bool
) -> Superblock:
    """Wipe both ends, then write the superblock there and read it back; raises OSError."""
    superblock = Superblock(
        warehouse, uuid4(), index, ByteCount(size), Millis(time.time_ns() // 1_000_000)
    )
    if is_block:
        with suppress(OSError):  # best effort: not every drive can
            fcntl.ioctl(descriptor, BLKDISCARD, struct.pack("=QQ", 0, size))
    with mmap.mmap(-1, DATA_START) as zeros, mmap.mmap(-1, ALIGN) as packed:
        packed[:] = superblock.pack()
        for offset in (0, size - DATA_START):
            if os.pwrite(descriptor, zeros, offset) != DATA_START:
                raise OSError(errno.EIO, "short write")
        os.fdatasync(descriptor)
        for offset in (size - ALIGN, 0):
            if os.pwrite(descriptor, packed, offset) != ALIGN:
                raise OSError(errno.EIO, "short write")
        os.fdatasync(descriptor)
    for offset in (0, size - ALIGN):
        if superblock_at(descriptor, offset) != superblock:
            raise OSError(errno.EIO, f"the superblock at {offset} was not kept")
    return superblock
