"""Creating and opening: what is wrong is one error, found before anything is changed.

What memory is built from the tables is compared by `open_warehouse`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    block_at,
    chain_of,
    make_warehouse,
    open_warehouse,
    put,
    read_all,
)
from twfs.core import opening
from twfs.devices.formatting import DeviceSpec
from twfs.errors import (
    CorruptMetadata,
    CorruptSuperblock,
    DeviceInUse,
    FormatTooNew,
    InvalidInput,
    NoSuchWarehouse,
    TruncatedDevice,
    WarehouseBusy,
    WarehouseExists,
    WrongDevice,
)
from twfs.metadata.environment import Metadata
from twfs.metadata.tables import LENGTH, WriteView
from twfs.records import FORMAT_VERSION, Superblock
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

REPOSITORY = Path(__file__).parents[2]


def job_on(directory: Path, job: object) -> None:
    """Change the metadata of a closed warehouse."""
    metadata = Metadata.open(directory / "meta")
    metadata.submit(job).result()  # type: ignore[arg-type]
    metadata.close()


def open_and_close(directory: Path) -> None:
    Warehouse.open(directory).close()


def test_a_new_warehouse_is_empty_and_whole(scratch: Path) -> None:
    with open_warehouse(scratch / "w", (DEVICE_BYTES, 2 * DEVICE_BYTES)) as warehouse:
        space = warehouse.space()
        assert space.total_bytes == space.free_bytes == 3 * DEVICE_BYTES - 2 * ((1 << 20) + ALIGN)
        assert warehouse.models() == []
        assert [device.index for device in warehouse.devices.values()] == [0, 1]
        assert warehouse.notes == []


def test_a_warehouse_may_be_moved_with_its_images(scratch: Path) -> None:
    with open_warehouse(scratch / "here") as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
    (scratch / "here").rename(scratch / "there")
    with open_warehouse(scratch / "there") as warehouse:
        assert read_all(warehouse, warehouse.open_model("m"), chain_of(model, 3)) == 3


def test_creating_over_a_warehouse_must_be_forced(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
        first = warehouse.uuid
        with pytest.raises(WarehouseExists, match="--force"):
            make_warehouse(scratch)
        with pytest.raises(WarehouseBusy):
            make_warehouse(scratch, force=True)
    make_warehouse(scratch, force=True)
    with open_warehouse(scratch) as warehouse:
        assert warehouse.uuid != first
        assert warehouse.models() == []


def test_what_is_beyond_repair_can_be_created_anew(scratch: Path) -> None:
    make_warehouse(scratch)
    os.truncate(scratch / "meta" / "data.mdb", 100)
    with pytest.raises(CorruptMetadata, match="create the warehouse anew"):
        open_and_close(scratch)
    make_warehouse(scratch, force=True)
    with open_warehouse(scratch) as warehouse:
        assert warehouse.models() == []


def test_creating_that_fails_leaves_nothing_behind(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise CorruptMetadata("at the last step")

    with monkeypatch.context() as patch:
        patch.setattr(Metadata, "create", failing)
        with pytest.raises(CorruptMetadata):
            Warehouse.create(
                scratch / "w", [DeviceSpec(scratch / "a.img", ByteCount(DEVICE_BYTES))]
            )
    assert list(scratch.iterdir()) == []
    (scratch / "precious").write_bytes(b"data" * 10_000_000)
    with pytest.raises(DeviceInUse):
        Warehouse.create(
            scratch / "w",
            [
                DeviceSpec(scratch / "a.img", ByteCount(DEVICE_BYTES)),
                DeviceSpec(scratch / "precious"),
            ],
        )
    assert [path.name for path in scratch.iterdir()] == ["precious"]


def test_requests_that_cannot_be_are_refused(scratch: Path) -> None:
    spec = DeviceSpec(scratch / "a.img", ByteCount(DEVICE_BYTES))
    for devices in ([], [spec, spec], [spec] * (opening.DEVICES_MAX + 1)):
        with pytest.raises(InvalidInput):
            Warehouse.create(scratch / "w", devices)
    with pytest.raises(InvalidInput):
        Warehouse.create(scratch / "w", [DeviceSpec(scratch / "b.img", ByteCount(ALIGN))])
    assert list(scratch.iterdir()) == []
    (scratch / "file").touch()
    with pytest.raises(InvalidInput, match="cannot be made"):
        Warehouse.create(scratch / "file" / "w", [spec])
    with pytest.raises(NoSuchWarehouse):
        open_and_close(scratch / "nowhere")


def test_a_missing_device_is_named_and_the_warehouse_can_be_opened_once_it_is_back(
    scratch: Path,
) -> None:
    make_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES))
    (scratch / "device1.img").rename(scratch / "away")
    with pytest.raises(WrongDevice, match=r"device1\.img"):
        Warehouse.open(scratch, degraded=False)
    with Warehouse.open(scratch) as warehouse:
        assert "device1.img" in warehouse.notes[0]
    (scratch / "away").rename(scratch / "device1.img")
    Warehouse.open(scratch, degraded=False).close()
    (scratch / "device0.img").rename(scratch / "away0")
    (scratch / "device1.img").rename(scratch / "away1")
    with pytest.raises(WrongDevice, match=r"device0\.img"):  # none is left
        open_and_close(scratch)


def test_swapped_and_foreign_devices_are_refused(scratch: Path) -> None:
    make_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES))
    make_warehouse(scratch / "other")
    (scratch / "device0.img").rename(scratch / "x")
    (scratch / "device1.img").rename(scratch / "device0.img")
    (scratch / "x").rename(scratch / "device1.img")
    with pytest.raises(WrongDevice, match="correct the path"):
        open_and_close(scratch)
    (scratch / "other" / "device0.img").rename(scratch / "device0.img")
    with pytest.raises(WrongDevice):
        open_and_close(scratch)


def test_damaged_devices_are_refused_each_with_its_cause(scratch: Path) -> None:
    make_warehouse(scratch)
    path = scratch / "device0.img"
    image = path.read_bytes()
    os.truncate(path, DEVICE_BYTES - ALIGN)
    with pytest.raises(TruncatedDevice, match=str(DEVICE_BYTES)):
        open_and_close(scratch)
    path.write_bytes(bytes(ALIGN) + image[ALIGN:-ALIGN] + bytes(ALIGN))
    with pytest.raises(CorruptSuperblock):
        open_and_close(scratch)
    path.write_bytes(bytes(ALIGN) + image[ALIGN:])
    with Warehouse.open(scratch) as warehouse:
        assert "first superblock" in warehouse.notes[0]
    newer = Superblock.unpack(image[:ALIGN])
    packed = Superblock(
        newer.warehouse, newer.device, newer.index, newer.size_bytes, newer.created_ms,
        newer.data_start, FORMAT_VERSION + 1,
    ).pack()  # fmt: skip
    path.write_bytes(packed + image[ALIGN:-ALIGN] + packed)
    with pytest.raises(FormatTooNew, match="upgrade"):
        open_and_close(scratch)


def test_an_open_that_fails_lets_go_of_everything(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)
    with monkeypatch.context() as patch:

        def failing(_: object) -> int:
            raise WrongDevice("replaced while it was open")

        patch.setattr("twfs.devices.device.Device.open_for_reader", failing)
        with pytest.raises(WrongDevice):
            open_and_close(scratch)
    open_and_close(scratch)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("blocks", b"short key", bytes(200)),
        ("blocks", bytes(23), b"short"),
        ("blocks", bytes(23), b"\xff" * 144),
        ("models", b"\0\0\0\1", b"{"),
        ("free", bytes(10), LENGTH.pack(1 << 60)),
        ("meta", b"devices", b"{}["),
        ("heads", b"\0\0\0\1" + bytes(16), b""),
    ],
)
def test_contradictions_in_the_metadata_are_errors_and_no_crash(
    scratch: Path, table: str, key: bytes, value: bytes
) -> None:
    """In a process of its own: the exit code is that of an error, not of a signal."""
    make_warehouse(scratch)

    def job(view: WriteView) -> None:
        view._put(table, key, value)

    job_on(scratch, job)
    code = f"""
from pathlib import Path
from twfs.errors import TwfsError
from twfs.warehouse import Warehouse
try:
    with Warehouse.open(Path({str(scratch)!r})) as warehouse:
        findings = warehouse.check().findings
        print("findings" if findings else "nothing")
except TwfsError as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("findings" if table == "heads" else "CorruptMetadata")


def test_heat_outlives_the_process_and_its_loss_is_no_error(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        slot = block_at(warehouse, model, names, 1)[1].slot
        warehouse._core.slots.use([slot], 1 << 45)
    with open_warehouse(scratch) as warehouse:
        assert warehouse.sessions(model.id)[0].last_use_ms > 0
        assert int(warehouse._core.slots.stamp[slot]) == 1 << 45
        warehouse.touch(model, names)
        assert int(warehouse._core.slots.stamp[slot]) == 1 << 45
    (scratch / "heat").unlink()
    with open_warehouse(scratch) as warehouse:
        assert read_all(warehouse, model, names) == 3


def test_generations_and_inodes_are_never_given_twice(scratch: Path) -> None:
    """Also when nothing was published, and over reopening: a range is durable before its use."""
    seen: set[int] = set()
    inos: set[int] = set()
    for turn in range(4):
        with open_warehouse(scratch) as warehouse:
            model = warehouse.open_model("m", MHA)
            generations, numbers = warehouse._core.take_numbers(3)
            assert not seen & set(generations)
            assert not inos & set(numbers)
            seen |= set(generations)
            inos |= set(numbers)
            names = chain_of(model, 2, turn)
            put(warehouse, model, names)
            _, block = block_at(warehouse, model, names, 1)
            assert block.generation not in seen
            seen.add(block.generation)
            inos.add(block.ino)
