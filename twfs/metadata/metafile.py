"""LMDB's file before LMDB maps it: whether it is whole, and whether it is sound.

What is wrong in a mapped file ends the process by a signal; here it is only read.
"""

import fcntl
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import lmdb.verify  # noqa: TID251

from twfs.errors import CorruptMetadata
from twfs.metadata.tables import TABLES
from twfs.units import ALIGN

META_LAST_AND_TXN: Final = struct.Struct("<QQ")
META_LAST_OFFSET: Final = 16 + 24 + 2 * 48  # LMDB 0.9: page header, fixed part, two MDB_db
MAP_BYTES: Final = 1 << 40  # address space only; the file grows as it is filled


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


# Reads every row, and begins a change of every tree: all that LMDB would touch.
_SCOUT: Final = """
import sys, lmdb
try:
    env = lmdb.open(sys.argv[1], max_dbs=16, map_size=int(sys.argv[2]), lib_version=0)
    tables = [
        env.open_db(name.encode(), dupsort=name == "children", create=False)
        for name in sys.argv[3:]
    ]
    with env.begin(write=True) as txn:
        for table in tables:
            for row in txn.cursor(db=table):
                pass
        for table in tables:
            txn.put(b"0", b"0", db=table)
        txn.abort()
except (lmdb.MemoryError, lmdb.NotFoundError):
    pass  # no damage: whoever opens it will say what it is
except lmdb.Error as error:
    sys.exit(str(error))
"""


def scout(directory: Path) -> None:
    """Let a child process read and begin to change all tables; CorruptMetadata if it dies of it.

    LMDB ends the process (SIGABRT, SIGSEGV, SIGBUS) on some damage to its pages, and its pages
    have no checksums. Costs about 60 ms and 3 us a row. Says nothing where there is no metadata,
    or somebody else has it open: opening it says that better.
    """
    path = directory / "data.mdb"
    try:
        lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not path.exists():
            return
        refuse_truncated(path)
        command = [sys.executable, "-c", _SCOUT, str(directory), str(MAP_BYTES)]
        done = subprocess.run(
            [*command, *TABLES, "children"], capture_output=True, text=True, check=False
        )
    except PermissionError:  # the interpreter may not be started again by this user: no scout
        return
    finally:
        os.close(lock_fd)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorruptMetadata(
            f"{path} is damaged: a process that read it ended with {done.returncode} ({said}); the "
            "metadata must be made anew from the devices, or restored from a copy as new as they"
        )


def read_ahead(path: Path) -> None:
    """Ask the kernel to read the file now: matches touch it all over."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
