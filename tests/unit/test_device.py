"""A device is claimed by one process, never made over something else, and never written astray.

Real image files and loop devices. What is guaranteed: exclusive claims, refusals that name both
sides, O_DIRECT alignment enforced by us, one corrupt superblock survived, a failed flush is final.
"""

import fcntl
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import pytest

from support.loops import loop_device, needs_loops
from twfs.devices.device import Device, DeviceSpec, format_device, inspect
from twfs.devices.formatting import BLKID_SECONDS_MAX, PROBE_BYTES, SIGNATURES
from twfs.errors import (
    CorruptSuperblock,
    DeviceError,
    DeviceInUse,
    FormatTooNew,
    InvalidInput,
    NoSpaceForImage,
    NotAllowed,
    ReadOnly,
    TruncatedDevice,
    WarehouseBusy,
    WrongDevice,
)
from twfs.records import DATA_START, FORMAT_VERSION, Superblock
from twfs.units import ALIGN, IO_BYTES_MAX, ByteCount, ByteOffset, DeviceIndex

SIZE = ByteCount(32 << 20)
WAREHOUSE = UUID("0c2364ae-6d54-4892-8e38-e1c47980f4c5")
INDEX = DeviceIndex(3)
START = ByteOffset(DATA_START)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "device.img"


def made(path: Path, size: int | None = SIZE, *, force: bool = False) -> Superblock:
    spec = DeviceSpec(path, None if size is None else ByteCount(size))
    return format_device(spec, warehouse=WAREHOUSE, index=INDEX, force=force)


def opened(path: Path, superblock: Superblock, *, read_only: bool = False) -> Device:
    return Device.open(
        path, warehouse=WAREHOUSE, device=superblock.device, index=INDEX, read_only=read_only
    )


@pytest.fixture
def device(image: Path) -> Iterator[Device]:
    device = opened(image, made(image))
    yield device
    device.close()


def buffer(byte_count: int, fill: bytes = b"") -> memoryview:
    """Aligned memory, repeating *fill* if it is given."""
    view = memoryview(mmap.mmap(-1, byte_count))
    if fill:
        view[:] = (fill * (byte_count // len(fill) + 1))[:byte_count]
    return view


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# Making


def test_new_image_is_allocated_whole_and_both_superblocks_agree(image: Path) -> None:
    superblock = made(image)
    assert image.stat().st_size == SIZE
    assert image.stat().st_blocks * 512 >= SIZE
    assert image.stat().st_mode & 0o077 == 0
    data = image.read_bytes()
    assert data[:ALIGN] == data[-ALIGN:] == superblock.pack()
    assert (superblock.warehouse, superblock.index) == (WAREHOUSE, INDEX)


def test_sizes_are_rounded_down_to_4_kib(image: Path) -> None:
    assert made(image, SIZE + 5000).size_bytes == SIZE + ALIGN
    assert image.stat().st_size == SIZE + ALIGN


def test_device_below_16_mib_is_refused_and_leaves_no_file(image: Path) -> None:
    with pytest.raises(InvalidInput, match="16 MiB"):
        made(image, (16 << 20) - 1)
    assert not image.exists()
    image.write_bytes(bytes(ALIGN))
    with pytest.raises(InvalidInput, match="16 MiB"):
        made(image, None)
    assert image.read_bytes() == bytes(ALIGN)


def test_image_larger_than_the_filesystem_leaves_no_file(image: Path) -> None:
    room = os.statvfs(image.parent)
    wanted = (room.f_blocks * room.f_frsize // ALIGN + 1) * ALIGN
    with pytest.raises(NoSpaceForImage, match=f"{wanted} bytes.* free"):
        made(image, wanted)
    assert not image.exists()


def test_forced_image_without_room_keeps_what_was_there(image: Path) -> None:
    image.write_bytes(b"precious")
    room = os.statvfs(image.parent)
    with pytest.raises(NoSpaceForImage):
        made(image, room.f_blocks * room.f_frsize + ALIGN, force=True)
    assert image.read_bytes() == b"precious"


def test_existing_file_is_overwritten_only_by_force(image: Path) -> None:
    image.write_bytes(b"a thesis")
    with pytest.raises(DeviceInUse, match="data of an unknown kind"):
        made(image)
    assert image.read_bytes() == b"a thesis"
    opened(image, made(image, force=True)).close()
    assert image.stat().st_size == SIZE


def test_empty_existing_file_may_become_an_image(image: Path) -> None:
    image.touch()
    opened(image, made(image)).close()


def test_existing_image_is_used_whole_and_allocated(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(SIZE + 100)
    superblock = made(image, None)
    assert superblock.size_bytes == SIZE
    assert image.stat().st_blocks * 512 >= SIZE
    opened(image, superblock).close()


def test_file_with_unknown_data_is_refused(image: Path) -> None:
    image.write_bytes(b"tar" * (SIZE // 3))
    with pytest.raises(DeviceInUse, match="unknown kind"):
        made(image, None)
    assert image.read_bytes()[:3] == b"tar"


def test_device_of_a_warehouse_is_made_anew_only_by_force(image: Path) -> None:
    before = made(image)
    for size in (SIZE, None):
        with pytest.raises(DeviceInUse, match=str(WAREHOUSE)):
            made(image, size)
    after = made(image, None, force=True)
    assert after.device != before.device
    with pytest.raises(WrongDevice):
        opened(image, before)


def test_image_in_use_is_not_made_anew_even_by_force(device: Device) -> None:
    for size in (None, SIZE):
        with pytest.raises(WarehouseBusy, match=str(device.path)):
            made(device.path, size, force=True)
    first, last = device.superblocks()
    assert first == last == device.superblock


def test_missing_paths_and_wrong_kinds_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongDevice, match="not there"):
        made(tmp_path / "absent.img", None)
    with pytest.raises(WrongDevice, match="not there"):
        made(tmp_path / "absent" / "device.img")
    with pytest.raises(InvalidInput, match="neither"):
        made(tmp_path, None)
    with pytest.raises(InvalidInput, match="neither"):
        made(Path("/dev/null"), None)


# Seeing what is there


@pytest.mark.parametrize(("offset", "magic", "words"), SIGNATURES)
def test_every_known_signature_is_named_without_blkid(
    image: Path, monkeypatch: pytest.MonkeyPatch, offset: int, magic: bytes, words: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_named: None)
    data = bytearray(PROBE_BYTES)
    data[offset : offset + len(magic)] = magic
    image.write_bytes(data)
    assert inspect(image) == words


def test_blank_file_carries_nothing(image: Path) -> None:
    image.write_bytes(bytes(SIZE))
    assert inspect(image) is None


def test_last_superblock_alone_still_names_its_warehouse(image: Path) -> None:
    made(image)
    overwrite(image, 0, bytes(ALIGN))
    assert str(WAREHOUSE) in (inspect(image) or "")


@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is missing")
def test_filesystem_in_an_image_is_refused_until_forced(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=BLKID_SECONDS_MAX)
    with pytest.raises(DeviceInUse, match="ext4"):
        made(image, None)
    superblock = made(image, None, force=True)
    opened(image, superblock).close()
    assert "twfs" in (inspect(image) or "")


# Opening


def test_second_open_is_refused_until_the_first_is_closed(image: Path) -> None:
    superblock = made(image)
    first = opened(image, superblock)
    for read_only in (False, True):
        with pytest.raises(WarehouseBusy, match=str(image)):
            opened(image, superblock, read_only=read_only)
    first.close()
    first.close()
    opened(image, superblock).close()


def test_reader_descriptor_does_not_keep_the_claim(image: Path) -> None:
    superblock = made(image)
    device = opened(image, superblock)
    descriptor = device.open_for_reader()
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    assert flags & os.O_DIRECT
    assert flags & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(descriptor)
    device.close()
    opened(image, superblock).close()
    view = buffer(ALIGN)
    assert os.preadv(descriptor, [view], 0) == ALIGN
    assert bytes(view) == superblock.pack()
    os.close(descriptor)


def test_reader_is_never_given_a_file_that_took_the_place_of_the_device(device: Device) -> None:
    device.path.rename(device.path.with_suffix(".old"))
    with pytest.raises(WrongDevice, match="not there"):
        device.open_for_reader()
    made(device.path)
    with pytest.raises(WrongDevice, match="replaced"):
        device.open_for_reader()


def test_every_wrong_identity_is_refused_with_both_names(image: Path) -> None:
    superblock = made(image)
    other = uuid4()
    for warehouse, device, index in (
        (other, superblock.device, INDEX),
        (WAREHOUSE, other, INDEX),
        (WAREHOUSE, superblock.device, DeviceIndex(4)),
    ):
        with pytest.raises(WrongDevice) as caught:
            Device.open(image, warehouse=warehouse, device=device, index=index)
        assert str(superblock.device) in str(caught.value)
        assert f"device {index} ({device}) of warehouse {warehouse}" in str(caught.value)
    with pytest.raises(WrongDevice, match="not there"):
        Device.open(
            image.with_name("gone"), warehouse=WAREHOUSE, device=superblock.device, index=INDEX
        )


@pytest.mark.parametrize("cut", [ALIGN, 1, SIZE // 2])
def test_truncated_device_is_refused_with_both_sizes(image: Path, cut: int) -> None:
    superblock = made(image)
    os.truncate(image, SIZE - cut)
    with pytest.raises(TruncatedDevice, match=f"{SIZE - cut} bytes.*says {SIZE}"):
        opened(image, superblock)


def test_corrupt_first_superblock_is_survived_and_said(image: Path) -> None:
    superblock = made(image)
    overwrite(image, 100, b"\xff")
    device = opened(image, superblock)
    assert device.notes == [
        f"first superblock copy is corrupt; the copy at offset {SIZE - ALIGN} is used"
    ]
    assert device.superblock == superblock
    first, last = device.superblocks()
    assert isinstance(first, str)
    assert last == superblock
    device.close()


def test_corrupt_last_superblock_is_said(image: Path) -> None:
    superblock = made(image)
    overwrite(image, SIZE - ALIGN, b"\xff")
    device = opened(image, superblock)
    assert device.notes == [f"last superblock copy, at offset {SIZE - ALIGN}, is corrupt"]
    device.close()


def test_two_corrupt_superblocks_are_refused(image: Path) -> None:
    superblock = made(image)
    overwrite(image, 0, bytes(ALIGN))
    overwrite(image, SIZE - 1, b"\xff" if superblock.pack()[-1] != 0xFF else b"\0")
    with pytest.raises(CorruptSuperblock, match=r"magic.*checksum"):
        opened(image, superblock)


def test_newer_format_is_refused(image: Path) -> None:
    superblock = made(image)
    newer = replace(superblock, version=FORMAT_VERSION + 1).pack()
    overwrite(image, 0, newer)
    with pytest.raises(FormatTooNew, match=f"version {FORMAT_VERSION + 1}"):
        opened(image, superblock)


def test_refused_device_is_not_left_claimed(image: Path) -> None:
    superblock = made(image)
    with pytest.raises(WrongDevice):
        Device.open(image, warehouse=uuid4(), device=superblock.device, index=INDEX)
    opened(image, superblock).close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_device_of_another_user_is_not_allowed() -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory, "device.img")
        superblock = made(path)
        Path(directory).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(NotAllowed, match=str(path)):
                opened(path, superblock)
            with pytest.raises(NotAllowed, match=str(path)):
                inspect(path)
        finally:
            os.seteuid(0)


# Reading and writing


def test_bytes_come_back_from_where_they_were_written(device: Device) -> None:
    start, length = device.data_area
    data = buffer(3 * ALIGN, b"first to third")
    last = ByteOffset(start + length - 3 * ALIGN)
    for offset in (start, ByteOffset(start + 5 * ALIGN), last):
        device.write_from([data[:ALIGN], data[ALIGN:]], offset)
    device.flush()
    for offset in (start, ByteOffset(start + 5 * ALIGN), last):
        back = buffer(3 * ALIGN)
        device.read_into([back[: 2 * ALIGN], back[2 * ALIGN :]], offset)
        assert back == data
    assert device.path.read_bytes()[last : last + 3 * ALIGN] == bytes(data)


def test_more_than_one_system_call_takes_is_moved_whole(image: Path) -> None:
    device = opened(image, made(image, 64 << 20))
    data = buffer(IO_BYTES_MAX + 40 * ALIGN)
    for at in range(0, len(data), ALIGN):
        data[at : at + 8] = at.to_bytes(8, "little")
    device.write_from([data], START)
    back = buffer(len(data))
    device.read_into([back[at : at + ALIGN] for at in range(0, len(back), ALIGN)], START)
    assert back == data
    device.close()


@pytest.mark.parametrize("step", [ALIGN, 3 * ALIGN, 5 * ALIGN])
def test_short_counts_are_gone_on_with(device: Device, step: int) -> None:
    data = buffer(11 * ALIGN)
    for at in range(0, len(data), ALIGN):
        data[at : at + 8] = at.to_bytes(8, "little")
    device.write_from([data], START)
    back = buffer(len(data))

    def short_preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        wanted, left = [], step
        for view in views:
            wanted.append(view[:left])
            left -= len(wanted[-1])
        return os.preadv(descriptor, [view for view in wanted if view], offset)

    views = [back[: 2 * ALIGN], back[2 * ALIGN : 9 * ALIGN], back[9 * ALIGN :]]
    device._transfer(short_preadv, "read", device._descriptor, views, START)
    assert back == data


def test_short_count_that_is_not_aligned_is_an_error(device: Device) -> None:
    with pytest.raises(DeviceError, match="only 512 bytes"):
        device._transfer(lambda *_: 512, "read", device._descriptor, [buffer(ALIGN)], START)


def test_every_misalignment_is_refused_before_the_kernel_sees_it(device: Device) -> None:
    data = buffer(4 * ALIGN, b"x")
    for views, offset, word in (
        ([data[:ALIGN]], START + 512, "offset"),
        ([data[: ALIGN - 512]], START, "buffer of"),
        ([data[:0]], START, "buffer of 0"),
        ([data[512 : 512 + ALIGN]], START, "address"),
        ([data[:ALIGN], data[ALIGN + 1 : 2 * ALIGN + 1]], START, "address"),
        ([data[::2]], START, "contiguous"),
    ):
        for call in (device.read_into, device.write_from):
            with pytest.raises(InvalidInput, match=word):
                call(views, ByteOffset(offset))
    assert data == buffer(4 * ALIGN, b"x")
    assert device.statistics().reads == device.statistics().writes == 0


def test_superblocks_cannot_be_overwritten_and_reads_end_at_the_end(device: Device) -> None:
    piece = buffer(ALIGN)
    for offset in (0, DATA_START - ALIGN, SIZE - ALIGN, SIZE, -ALIGN, 1 << 60):
        with pytest.raises(InvalidInput, match="may be used"):
            device.write_from([piece], ByteOffset(offset))
    device.read_into([piece], ByteOffset(SIZE - ALIGN))
    assert bytes(piece) == device.superblock.pack()
    for offset in (SIZE, -ALIGN):
        with pytest.raises(InvalidInput):
            device.read_into([piece], ByteOffset(offset))
    with pytest.raises(InvalidInput):
        device.write_from([piece, piece], ByteOffset(SIZE - 2 * ALIGN))
    with pytest.raises(InvalidInput):
        device.read_into([], START)


def test_reads_into_read_only_memory_are_refused(device: Device) -> None:
    with pytest.raises(InvalidInput, match="read-only"):
        device.read_into([buffer(ALIGN).toreadonly()], START)
    device.write_from([buffer(ALIGN, b"y").toreadonly()], START)


def test_read_that_finds_too_few_bytes_is_an_error_with_the_place(device: Device) -> None:
    os.truncate(device.path, SIZE // 2)
    with pytest.raises(DeviceError, match=rf"read of {ALIGN} bytes at offset {SIZE // 2} of .*img"):
        device.read_into([buffer(ALIGN)], ByteOffset(SIZE // 2))
    assert device.statistics().errors == 1


def test_refused_write_is_an_error_with_the_place(device: Device) -> None:
    spare = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
    os.dup2(spare, device._descriptor)  # EBADF from now on
    os.close(spare)
    with pytest.raises(DeviceError, match=rf"write of {ALIGN} bytes at offset {START} of .*: Bad"):
        device.write_from([buffer(ALIGN)], START)


def test_read_only_device_refuses_writes(image: Path) -> None:
    device = opened(image, made(image), read_only=True)
    device.read_into([buffer(ALIGN)], START)
    with pytest.raises(ReadOnly):
        device.write_from([buffer(ALIGN)], START)
    with pytest.raises(DeviceError):
        device._transfer(os.pwritev, "write", device._descriptor, [buffer(ALIGN)], START)
    device.close()


def test_failed_flush_is_final(device: Device) -> None:
    piece = buffer(ALIGN, b"z")
    device.write_from([piece], START)
    kept = os.dup(device._descriptor)
    pipe_out, pipe_in = os.pipe()
    os.dup2(pipe_in, device._descriptor)  # fdatasync of a pipe is refused
    with pytest.raises(DeviceError, match="flush"):
        device.flush()
    os.dup2(kept, device._descriptor)  # the next flush would succeed, as after EIO of a drive
    for call in (
        device.flush,
        lambda: device.write_from([piece], START),
    ):
        with pytest.raises(DeviceError, match="a failed flush is final"):
            call()
    device.read_into([piece], START)
    assert device.statistics().flushes == 0
    for descriptor in (kept, pipe_out, pipe_in):
        os.close(descriptor)


def test_image_keeps_its_blocks_when_told_to_discard(device: Device) -> None:
    before = device.path.stat().st_blocks
    assert not device.discard(START, ByteCount(1 << 20))
    assert device.path.stat().st_blocks == before
    for offset, length in ((0, ALIGN), (START, 0), (START + 1, ALIGN), (SIZE - ALIGN, ALIGN)):
        with pytest.raises(InvalidInput):
            device.discard(ByteOffset(offset), ByteCount(length))


def test_close_waits_for_io_under_way_and_refuses_more(device: Device) -> None:
    closer = threading.Thread(target=device.close)
    with device._using("read") as descriptor:
        closer.start()
        while not device._closed:  # set before it waits
            threading.Event().wait(0.001)
        with pytest.raises(DeviceError, match="closed"):
            device.read_into([buffer(ALIGN)], START)
        os.fstat(descriptor)
    closer.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_counters_of_many_threads_add_up(device: Device) -> None:
    def work() -> None:
        view = buffer(2 * ALIGN)
        for _ in range(50):
            device.write_from([view], START)
            device.read_into([view], START)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = device.statistics()
    assert (counts.reads, counts.writes, counts.in_flight) == (200, 200, 0)
    assert counts.read_bytes == counts.written_bytes == 200 * 2 * ALIGN


# Block devices


@pytest.mark.root
@needs_loops
def test_claimed_block_device_refuses_mkfs_and_a_second_open(image: Path) -> None:
    with loop_device(image, SIZE) as path:
        superblock = made(path, None)
        assert superblock.size_bytes == SIZE
        device = opened(path, superblock)
        assert device.is_block
        with pytest.raises(WarehouseBusy, match=str(path)):
            opened(path, superblock)
        with pytest.raises(WarehouseBusy, match=str(path)):
            made(path, None, force=True)
        mkfs = subprocess.run(
            ["mkfs.ext4", "-F", "-q", str(path)], capture_output=True, text=True, check=False
        )
        assert mkfs.returncode != 0
        assert "in use" in mkfs.stderr
        descriptor = device.open_for_reader()
        device.close()
        again = opened(path, superblock)
        os.close(descriptor)
        assert again.notes == []
        again.close()


@pytest.mark.root
@needs_loops
def test_block_device_reads_back_and_forgets_what_was_discarded(image: Path) -> None:
    with loop_device(image, SIZE) as path:
        device = opened(path, made(path, None))
        data = buffer(1 << 20, b"some bytes")
        device.write_from([data], START)
        device.flush()
        back = buffer(1 << 20)
        device.read_into([back], START)
        assert back == data
        if device.discard(START, ByteCount(1 << 20)):
            device.read_into([back], START)
            assert bytes(back) == bytes(1 << 20)
        assert device.superblocks() == (device.superblock, device.superblock)
        device.close()


@pytest.mark.root
@needs_loops
def test_filesystem_on_a_block_device_is_refused_and_a_mounted_one_even_by_force(
    image: Path, tmp_path: Path
) -> None:
    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    with loop_device(image, SIZE) as path:
        subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
        with pytest.raises(DeviceInUse, match="ext"):
            made(path, None)
        subprocess.run(["mount", str(path), str(mount_point)], check=True)
        try:
            with pytest.raises(WarehouseBusy):
                made(path, None, force=True)
        finally:
            subprocess.run(["umount", str(mount_point)], check=True)
        with pytest.raises(InvalidInput, match="leave the size out"):
            made(path, SIZE, force=True)
        opened(path, made(path, None, force=True)).close()
        assert "twfs" in (inspect(path) or "")
