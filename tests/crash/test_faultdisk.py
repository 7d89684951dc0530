"""The faulty disk itself: it does what its rules say and no more, and always comes down.

Its log has every write, flush and mark in order; a rule acts where and as often as it says; a test
that fails while the disk hangs, or whose disk has died, leaves neither a mount nor a loop device.
"""

import mmap
import os
import threading
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from support.faultrules import Act, Kind, Op, Rule, read_log
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.mounting import until

pytestmark = [pytest.mark.root, pytest.mark.fuse, needs_faults]

BLOCK = 4096
DISK_BYTES = 1 << 20


class Raw:
    """A disk as a block device, past every cache."""

    def __init__(self, disks: FaultyDisks, name: str) -> None:
        self.descriptor = os.open(disks.loops[name], os.O_RDWR | os.O_DIRECT)

    def read(self, block: int) -> bytes:
        """One block of 4 KiB; OSError."""
        with mmap.mmap(-1, BLOCK) as buffer:
            os.preadv(self.descriptor, [buffer], block * BLOCK)
            return bytes(buffer)

    def write(self, block: int, letter: bytes) -> None:
        """Fill one block; OSError."""
        with mmap.mmap(-1, BLOCK) as buffer:
            buffer[:] = letter * BLOCK
            os.pwritev(self.descriptor, [buffer], block * BLOCK)

    def flush(self) -> None:
        """Flush; OSError."""
        os.fdatasync(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def test_the_log_has_all_that_happened_on_all_disks_in_order(scratch: Path) -> None:
    with faulty_disks(scratch / "f", {"a": DISK_BYTES, "b": DISK_BYTES}, logging=True) as disks:
        with Raw(disks, "a") as a, Raw(disks, "b") as b:
            disks.control.mark("begin")
            a.write(3, b"x")
            disks.control.mark("between")
            b.write(5, b"y")
            a.flush()
            assert a.read(3) == b"x" * BLOCK
            assert b.read(5) == b"y" * BLOCK
        disks.control.mark("end")
        found = [(each.kind, each.disk, each.offset, each.data[:4]) for each in read_log(disks.log)]
    begin = found.index((Kind.MARK, 0, 0, b"begi")) + 1  # attaching a loop device flushes too
    assert found[begin : begin + 4] == [
        (Kind.WRITE, 0, 3 * BLOCK, b"xxxx"),
        (Kind.MARK, 0, 0, b"betw"),
        (Kind.WRITE, 1, 5 * BLOCK, b"yyyy"),
        (Kind.FLUSH, 0, 0, b""),
    ]
    assert found[-1] == (Kind.MARK, 0, 0, b"end")


def test_a_rule_acts_where_and_as_often_as_it_says(scratch: Path) -> None:
    with faulty_disks(scratch / "f", {"a": DISK_BYTES}) as disks, Raw(disks, "a") as a:
        for block in range(4):
            a.write(block, b"x")
        second = partial(Rule, disk="a", low=BLOCK, high=2 * BLOCK)
        disks.set_rules(second(op=Op.READ, act=Act.EIO, skip=1, times=2))
        assert a.read(0) == a.read(1) == a.read(2) == b"x" * BLOCK
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                a.read(1)
        assert a.read(1) == b"x" * BLOCK
        assert disks.acted() == [2]
        disks.set_rules(second(op=Op.WRITE, act=Act.TORN, amount=512))
        a.write(1, b"z")
        assert a.read(1) == b"z" * 512 + b"x" * (BLOCK - 512)
        disks.set_rules(second(op=Op.WRITE, act=Act.MISDIRECT, amount=BLOCK))
        a.write(1, b"m")
        assert (a.read(1)[-1:], a.read(2)) == (b"x", b"m" * BLOCK)
        disks.set_rules(second(op=Op.READ, act=Act.FLIP))
        assert a.read(1)[:2] == bytes([b"z"[0] ^ 1]) + b"z"
        disks.set_rules(Rule(disk="a", op=Op.FLUSH, act=Act.EIO, times=1))
        with pytest.raises(OSError, match="Input/output"):
            a.flush()
        a.flush()


def test_a_test_that_fails_while_the_disk_hangs_leaves_nothing(scratch: Path) -> None:
    found: list[bytes] = []

    def read(disks: FaultyDisks) -> None:
        with Raw(disks, "a") as raw:
            found.append(raw.read(0))

    def fail_while_it_hangs() -> None:
        with faulty_disks(scratch / "f", {"a": DISK_BYTES}) as disks:
            disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.HANG))
            threads.append(threading.Thread(target=read, args=(disks,)))
            threads[0].start()
            until(lambda: disks.hanging() == 1, "the read hangs")
            raise ZeroDivisionError

    threads: list[threading.Thread] = []
    with pytest.raises(ZeroDivisionError):
        fail_while_it_hangs()
    threads[0].join(timeout=60)
    assert found == [bytes(BLOCK)]


def test_a_disk_whose_process_dies_gives_errors_and_comes_down(scratch: Path) -> None:
    with faulty_disks(scratch / "f", {"a": DISK_BYTES}) as disks, Raw(disks, "a") as a:
        a.write(0, b"x")
        disks.kill()
        with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
            a.read(0)
