"""Every byte that the mount hands out was verified; what is gone or bad is an error."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from support.mounting import Mount, expected, mounted, refused, shell, store, until
from support.warehouses import BIG, MHA, block_at, chain_of, flip_payload
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

pytestmark = pytest.mark.fuse

BLOCKS = 4


def test_tools_read_what_was_stored(mount: Mount, scratch: Path) -> None:
    _, names = store(mount, "big", BIG, BLOCKS)
    session = mount.session("big", names)
    for line in shell("sha256sum", *sorted(session.glob("*.kv"))).splitlines():
        digest, name = line.split()
        wanted = expected(BIG, names, int(Path(name).stem))
        assert digest == hashlib.sha256(wanted).hexdigest()
    for command in (
        ("cp", "-r", session, scratch / "cp"),
        ("cp", "-a", session, scratch / "archive"),
        ("rsync", "-a", f"{session}/", scratch / "rsync"),
        ("sh", "-c", f"mkdir tar && tar -C {session} -cf - . | tar -C tar -xf -"),
    ):
        shell(*command, cwd=scratch)
    for copy in ("cp", "archive", "rsync", "tar"):
        shell("diff", "-r", session, scratch / copy)


def test_reads_of_any_size_and_place_are_right(mount: Mount) -> None:
    _, names = store(mount, "big", BIG, 1)
    wanted = expected(BIG, names, 0)
    for flags in (0, os.O_DIRECT):
        file = os.open(mount.session("big", names) / "00000.kv", os.O_RDONLY | flags)
        try:
            for offset, size in ((0, 4096), (8192, 65536), (len(wanted) - 4096, 8192)):
                got = bytearray(size)
                count = os.preadv(file, [memoryview(got)], offset) if not flags else None
                data = bytes(got[:count]) if count is not None else os.pread(file, size, offset)
                assert data == wanted[offset : offset + size]
            assert os.pread(file, 4096, len(wanted)) == b""
        finally:
            os.close(file)


def test_concurrent_readers_read_a_block_once(mount: Mount) -> None:
    _, names = store(mount, "big", BIG, 1)
    path = mount.session("big", names) / "00000.kv"
    wanted, found = expected(BIG, names, 0), []

    def read() -> None:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            found.append(os.pread(file, len(wanted), 0) == wanted)
        finally:
            os.close(file)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert mount.statistics()["mount"]["payload_reads"] == 1


def test_reading_a_session_in_order_reads_ahead(mount: Mount) -> None:
    _, names = store(mount, "big", BIG, BLOCKS)
    session = mount.session("big", names)
    shell("ls", session)
    (session / "00000.kv").read_bytes()
    (session / "00001.kv").read_bytes()
    until(lambda: mount.statistics()["mount"]["payload_reads"] == 3, "the third block is read")
    assert (session / "00002.kv").read_bytes() == expected(BIG, names, 2)


def test_read_of_an_evicted_block_is_estale(mount: Mount) -> None:
    _, names = store(mount, "big", BIG, 2)
    file = os.open(mount.session("big", names) / "00001.kv", os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.pread(file, 4096, 0) == expected(BIG, names, 1)[:4096]
        with mount.client() as client:
            assert client.evict(ByteCount(1)) > 0
        with refused(errno.ESTALE):
            os.pread(file, 4096, 4096)
    finally:
        os.close(file)


def test_bytes_that_the_kernel_kept_go_with_the_block(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    file = os.open(mount.session("tiny", names) / "00000.kv", os.O_RDONLY)
    try:
        assert os.pread(file, 100, 0) == expected(MHA, names, 0)[:100]
        with mount.client() as client:
            assert client.evict(ByteCount(1)) > 0

        def stale() -> bool:
            try:
                return not os.pread(file, 100, 0)
            except OSError as error:
                return error.errno == errno.ESTALE

        until(stale, "the kernel drops what it kept")
    finally:
        os.close(file)


def test_block_that_was_stored_again_is_another_file(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    path = mount.session("tiny", names) / "00000.kv"
    before = path.stat().st_ino
    with mount.client() as client:
        client.evict(ByteCount(1))
    store(mount, "tiny", MHA, 1)
    until(lambda: path.stat().st_ino != before, "the new life is shown")
    assert path.read_bytes() == expected(MHA, names, 0)


def test_damaged_block_is_eio_and_the_others_are_served(scratch: Path) -> None:
    directory = scratch / "warehouse"
    with mounted(directory, scratch / "mnt") as mount:
        store(mount, "tiny", MHA, 3)
    with Warehouse.open(directory) as warehouse:
        model = warehouse.open_model("tiny")
        names = chain_of(model, 3)
        flip_payload(warehouse, block_at(warehouse, model, names, 1)[1], 17)
    with mounted(directory, scratch / "mnt", check=False) as mount:
        session = mount.session("tiny", names)
        with refused(errno.EIO):
            (session / "00001.kv").read_bytes()
        assert (session / "00002.kv").read_bytes() == expected(MHA, names, 2)
