"""Files of a mount on a real block device whose faults a test commands, for engines that use them.

Whatever is lost, the mount must answer an error or have the file no more: the tests on top compare
each byte, or each token, that an engine got.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from support.engines import until
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faulty_disks
from support.mounting import MOUNTED_BYTES, Mount, mounted, shell
from twfs.devices.formatting import DeviceSpec
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

FLIPPED: Final = 1000  # which byte of a file changes


class FaultyFiles:
    """The mount, its one disk, and what happens to both; made by faulty_files."""

    def __init__(self, disks: FaultyDisks, mount: Mount) -> None:
        self.disks = disks
        self.mount = mount
        self.directory = mount.path / "files/kv"
        self.directory.mkdir()

    def _place(self, file: Path) -> tuple[int, int]:
        """Offset and length on the disk of the first block of *file*, header included."""
        told = shell("getfattr", "--only-values", "-n", "user.twfs.extents", file)
        device, _, run = told.split()[0].partition(":")
        assert device == "0", told
        offset, _, length = run.partition("+")
        return int(offset), int(length)

    def rot(self, file: Path) -> None:
        """Change one bit of *file* on the medium itself, for good."""
        offset, length = self._place(file)
        assert length > ALIGN + FLIPPED
        with self.disks.images["a"].open("r+b") as image:
            image.seek(offset + ALIGN + FLIPPED)
            (byte,) = image.read(1)
            image.seek(-1, 1)
            image.write(bytes([byte ^ 0x10]))

    @contextmanager
    def rotten(self, file: Path) -> Iterator[None]:
        """Rot, for those who take contexts."""
        self.rot(file)
        yield

    @contextmanager
    def unreadable(self, file: Path) -> Iterator[None]:
        """From its first block on, *file* cannot be read in this context: the disk answers EIO."""
        low, length = self._place(file)
        self.disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.EIO, low=low, high=low + length))
        try:
            yield
            assert self.disks.acted()[0] > 0, "nobody has tried"
        finally:
            self.disks.lift()

    def hang(self) -> None:
        """Let all reads of the disk hang from now on, until kill."""
        self.disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.HANG))

    def kill_in_a_read(self) -> None:
        """Kill the daemon, and with it the mount, while it reads for somebody. After hang."""
        until(lambda: self.disks.hanging() > 0, "a read is under way")
        self.mount.process.kill()
        self.disks.lift()  # a process ends when its reads have
        self.mount.process.wait()

    def gone(self, file: Path) -> None:
        """Wait until *file*, which was lost, has no name any more."""
        until(lambda: not file.exists(), f"{file} is gone")


@contextmanager
def faulty_files(base: Path, size_bytes: int = MOUNTED_BYTES) -> Iterator[FaultyFiles]:
    """A warehouse of so many bytes on a faulty disk, mounted, in *base*; checked in the end."""
    with faulty_disks(base / "disks", {"a": size_bytes}) as disks:
        Warehouse.create(base / "warehouse", [DeviceSpec(disks.loops["a"])])
        with mounted(base / "warehouse", base / "mnt") as mount:
            try:
                yield FaultyFiles(disks, mount)
            finally:
                disks.lift()
