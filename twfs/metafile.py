"""LMDB's file before LMDB maps it: whether it is whole, and whether it is sound.

What is wrong in a mapped file ends the process by a signal; here it is only read.
"""

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import lmdb.verify  # noqa: TID251

from twfs.errors import CorruptMetadata
from twfs.units import ALIGN

META_LAST_AND_TXN: Final = struct.Struct("<QQ")
META_LAST_OFFSET: Final = 16 + 24 + 2 * 48  # LMDB 0.9: page header, fixed part, two MDB_db


def refuse_truncated(path: Path) -> None:
    """Raise CorruptMetadata if the file is shorter than its meta records say.

    LMDB maps the file, and touching a page that is not there is SIGBUS: the process is gone.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2 * ALIGN)
    last = 0
    if len(head) == 2 * ALIGN:
        last = max(
            META_LAST_AND_TXN.unpack_from(head, start + META_LAST_OFFSET)[0] for start in (0, ALIGN)
        )
    if size >= 2 * ALIGN and size >= (last + 1) * ALIGN:
        return
    try:
        problems = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        problems = [str(error)]
    if problems:
        raise CorruptMetadata(
            f"{path} has {size} bytes but names {(last + 1) * ALIGN}: it is truncated "
            f"({problems[0]}); run `twfs rebuild`, restore it or create the warehouse anew"
        )


def refuse_unverified(path: Path) -> None:
    """Raise CorruptMetadata if LMDB's verifier, which never hands the file to LMDB, objects."""
    try:
        problems = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - it walks damaged bytes: whatever it meets is damage
        problems = [str(error) or repr(error)]
    if problems:
        raise CorruptMetadata(
            f"{path} is damaged, in {len(problems)} places: {problems[0]}; run `twfs rebuild`, or "
            "restore it from a copy"
        )


def read_ahead(path: Path) -> None:
    """Ask the kernel to read the file now: matches touch it all over."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
