"""Who may open the files of a warehouse: its owner alone, or also the engines of one group.

    directory      0700, with a group 0750: engines reach the socket in it
    image files    0600, with a group 0640: cuFile opens them by path; other readers need no mode
    socket         0660 of that group
    meta/, record/ 0700, and the files in and beside them (heat, secret) 0600: the daemon's alone

Block devices keep the mode that udev gave them (SECURITY.md).
"""

import grp
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from twfs.errors import InvalidInput, NotAllowed

OWN_DIRECTORY: Final = 0o700
SHARED_DIRECTORY: Final = 0o750
SHARED_IMAGE: Final = 0o640
GID_DIGITS_MAX: Final = 9  # all of nine digits fit the kernel's 32 bits


def gid_of(group: str) -> int:
    """Return the number of *group*, a name or a number; InvalidInput if there is no such name."""
    if group.isascii() and group.isdigit() and len(group) <= GID_DIGITS_MAX:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError) as error:  # ValueError: a NUL in it
        raise InvalidInput(f"there is no group {group!r}: make it with `groupadd`") from error


def share(directory: Path, images: Iterable[Path], group: str) -> None:
    """Let *group* pass *directory* and read those of *images* that are files; NotAllowed."""
    gid = gid_of(group)
    try:
        os.chown(directory, -1, gid)
        directory.chmod(SHARED_DIRECTORY)
    except OSError as error:
        raise NotAllowed(
            f"{directory} cannot be given to group {group}: {error.strerror}"
        ) from error
    for path in images:
        share_image(path, gid)


def share_image(path: Path, gid: int) -> None:
    """Let the group *gid* read the device at *path* if it is a file; NotAllowed."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            os.chown(path, -1, gid)
            path.chmod(SHARED_IMAGE)
    except OSError as error:
        raise NotAllowed(f"{path} cannot be given to group {gid}: {error.strerror}") from error


def group_of(directory: Path) -> int | None:
    """Return the group that *directory* is shared with; None if it is its owner's alone."""
    try:
        found = directory.stat()
    except OSError:
        return None  # whoever opens it says better what is wrong
    return found.st_gid if stat.S_IMODE(found.st_mode) == SHARED_DIRECTORY else None
