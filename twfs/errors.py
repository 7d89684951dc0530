"""Every deliberate error of twfs: one class per cause, raised where the cause is found.

``errno`` is what the mount answers, ``exit_code`` what the command line ends with. The text is one
sentence for the operator, with the numbers in it and what to do next. Anything else that is raised
is a bug of ours and shows its traceback.
"""

import errno as _errno
from typing import ClassVar


class TwfsError(Exception):
    """The base of all deliberate errors; never raised itself."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1


class InvalidInput(TwfsError):
    """An argument from outside (name, path, key, tensor, size) that cannot be accepted."""

    errno = _errno.EINVAL
    exit_code = 2


class CheckFailed(TwfsError):
    """The checker found a broken invariant."""

    exit_code = 3


class NoSuchWarehouse(TwfsError):
    """The directory holds no warehouse."""

    errno = _errno.ENOENT
    exit_code = 4


class WarehouseExists(TwfsError):
    """A warehouse is already there, and creating over it was not forced."""

    errno = _errno.EEXIST
    exit_code = 5


class WarehouseBusy(TwfsError):
    """Another process has the warehouse, or one of its devices, open."""

    errno = _errno.EBUSY
    exit_code = 6


class DeviceInUse(TwfsError):
    """The device carries something else: a filesystem, partitions or another warehouse."""

    errno = _errno.EBUSY
    exit_code = 7


class WrongDevice(TwfsError):
    """A device is there, but it is not the one that the metadata names."""

    errno = _errno.ENODEV
    exit_code = 8


class CorruptSuperblock(TwfsError):
    """Neither copy of the superblock can be read."""

    exit_code = 9


class TruncatedDevice(TwfsError):
    """The device is smaller than its superblock says."""

    exit_code = 10


class CorruptMetadata(TwfsError):
    """The LMDB file is truncated, unreadable or contradicts itself."""

    exit_code = 11


class FormatTooNew(TwfsError):
    """Device or metadata were written by a newer twfs."""

    errno = _errno.EPROTONOSUPPORT
    exit_code = 12


class FormatTooOld(TwfsError):
    """Device or metadata were written by a twfs before this one, and are not read any more."""

    errno = _errno.EPROTONOSUPPORT
    exit_code = 33


class NoSpaceForImage(TwfsError):
    """The filesystem has no room for the image file or for the metadata."""

    errno = _errno.ENOSPC
    exit_code = 13


class WarehouseFull(TwfsError):
    """Nothing may be evicted to make room for a put."""

    errno = _errno.ENOSPC
    exit_code = 14


class PromiseRefused(WarehouseFull):
    """More would be pinned than may be: what was asked for is not promised, and not done."""

    exit_code = 35


class QuotaExceeded(WarehouseFull):
    """A tenant is at its quota, and nothing of its own may be evicted to make room for a put."""

    errno = _errno.EDQUOT
    exit_code = 42


class LayoutMismatch(TwfsError):
    """A model was opened with a layout that is not its own."""

    errno = _errno.EINVAL
    exit_code = 15


class NoSuchModel(TwfsError):
    """No model of that name."""

    errno = _errno.ENOENT
    exit_code = 16


class NoSuchTenant(TwfsError):
    """No tenant of that name."""

    errno = _errno.ENOENT
    exit_code = 34


class NoSuchBlock(TwfsError):
    """No block, session or prefix of that name."""

    errno = _errno.ENOENT
    exit_code = 17


class BlockGone(TwfsError):
    """A block that was there has been evicted since."""

    errno = _errno.ESTALE
    exit_code = 17


class DigestMismatch(TwfsError):
    """A block of that name exists with another digest: refused and counted, never mixed."""

    errno = _errno.EEXIST
    exit_code = 18


class BadPayload(TwfsError):
    """Bytes do not have the checksum that their writer stated."""

    exit_code = 19


class DeviceError(TwfsError):
    """The device answered a read, write or flush with an error."""

    exit_code = 20


class NoDaemon(TwfsError):
    """No daemon answers on the socket."""

    errno = _errno.ECONNREFUSED
    exit_code = 21


class ProtocolError(TwfsError):
    """A message that is garbage, too large, out of turn or of another version."""

    errno = _errno.EPROTO
    exit_code = 22


class NotAllowed(TwfsError):
    """The caller lacks the permission."""

    errno = _errno.EACCES
    exit_code = 23


class MountRefused(TwfsError):
    """The mount point or /dev/fuse cannot be used."""

    errno = _errno.EBUSY
    exit_code = 24


class StaleEpoch(TwfsError):
    """The model has opened a new epoch since the caller opened it."""

    errno = _errno.ESTALE
    exit_code = 25


class LeaseEnded(TwfsError):
    """The lease has been released, has passed its deadline or died with its connection."""

    errno = _errno.ESTALE
    exit_code = 26


class ReaderUnavailable(TwfsError):
    """A reader (cuFile, staged) was asked for by name and cannot work on this machine."""

    errno = _errno.ENOTSUP
    exit_code = 27


class NotEmpty(TwfsError):
    """A directory that still lists names, or is no session, cannot be removed."""

    errno = _errno.ENOTEMPTY
    exit_code = 28


class ReadOnly(TwfsError):
    """The mount or the warehouse is read-only."""

    errno = _errno.EROFS
    exit_code = 29


class TooLarge(TwfsError):
    """A request passes a stated limit: message, lease bytes, blocks of one put."""

    errno = _errno.E2BIG
    exit_code = 30


class WarehouseClosed(TwfsError):
    """The warehouse has been closed in this process, or is being closed."""

    errno = _errno.ESHUTDOWN
    exit_code = 32


class NoSuchDevice(TwfsError):
    """The warehouse has no device of that number."""

    errno = _errno.ENODEV
    exit_code = 40


class DeviceNotEmpty(TwfsError):
    """A device that is to be removed still holds blocks, or leases may still read there."""

    errno = _errno.EBUSY
    exit_code = 41


class NoSuchFile(TwfsError):
    """No file or directory of that name or inode is in the mounted tree of files."""

    errno = _errno.ENOENT
    exit_code = 42


class FileExists(TwfsError):
    """A file or directory of that name is there already, or being written."""

    errno = _errno.EEXIST
    exit_code = 43


class NotADirectory(TwfsError):
    """A file stands where a directory is wanted."""

    errno = _errno.ENOTDIR
    exit_code = 44


class IsADirectory(TwfsError):
    """A directory stands where a file is wanted."""

    errno = _errno.EISDIR
    exit_code = 45


class FileTooLarge(TwfsError):
    """A file would be larger than files of the mounted tree may be."""

    errno = _errno.EFBIG
    exit_code = 46


class NotSupported(TwfsError):
    """What files of the mounted tree cannot do: being changed in place, above all."""

    errno = _errno.EOPNOTSUPP
    exit_code = 47


class NameTooLong(TwfsError):
    """The name of a file has more bytes than names may have."""

    errno = _errno.ENAMETOOLONG
    exit_code = 49


class NoAttribute(TwfsError):
    """The file has no extended attribute of that name."""

    errno = _errno.ENODATA
    exit_code = 48


class EqualityFailed(TwfsError):
    """The demo's loaded KV, logits or tokens differ from what was saved."""

    exit_code = 31


class WeightsChanged(InvalidInput):
    """A model's weights were replaced while an engine may still run the old ones."""

    exit_code = 61


class GivenUp(TwfsError):
    """The caller gave a put up before its bytes were copied: it wants its memory back."""

    errno = _errno.ECANCELED
    exit_code = 60
