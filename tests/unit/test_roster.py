"""An epoch that was opened is never forgotten: the devices' roster knows it before LMDB does."""

import shutil
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from support.warehouses import DEVICE_BYTES, MHA, chain_of, make_warehouse, put, read_all
from twfs.devices.device import Device
from twfs.devices.roster import Roster, RosterModel, read_roster
from twfs.errors import CorruptMetadata, DeviceError, TooLarge
from twfs.metadata.environment import Metadata
from twfs.secret import SECRET_FILE
from twfs.tenants import Tenant
from twfs.units import Millis
from twfs.warehouse import Warehouse

SECRET, HOME = bytes(range(32)), UUID(int=5)
FULL = Roster(
    9, 100, 200, 3, (RosterModel("m", 4, MHA, Millis(7)),), (Tenant(1, "acme", 1001, (1001, 1002)),)
)


def test_a_roster_comes_back_as_it_went_in() -> None:
    assert Roster.unpack(FULL.pack(SECRET, HOME), SECRET, HOME) == FULL


def test_a_roster_of_another_secret_or_warehouse_or_with_any_changed_byte_is_none() -> None:
    packed = FULL.pack(SECRET, HOME)
    for secret, home in ((bytes(32), HOME), (SECRET, UUID(int=6))):
        with pytest.raises(ValueError, match="roster"):
            Roster.unpack(packed, secret, home)
    for at in range(len(packed)):
        with pytest.raises(ValueError, match="roster"):
            Roster.unpack(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :], SECRET, HOME)
    for count in range(len(packed)):
        with pytest.raises(ValueError, match="roster"):
            Roster.unpack(packed[:count], SECRET, HOME)


def test_a_roster_too_large_for_its_place_is_refused_before_it_is_written() -> None:
    names = (f"{number:x}-{'x' * 90}{number * 7919}" for number in range(100_000))
    models = tuple(RosterModel(name, 0, MHA, Millis(0)) for name in names)
    with pytest.raises(TooLarge, match="100000 models"):
        replace(FULL, models=models).pack(SECRET, HOME)


def rosters(warehouse: Warehouse) -> list[Roster | None]:
    core = warehouse._core
    return [read_roster(device, core.secret, core.uuid) for device in core.devices.values()]


def test_every_device_has_the_models_and_their_epochs(scratch: Path) -> None:
    make_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES))
    for turn in range(3):
        with Warehouse.open(scratch) as warehouse:
            model = warehouse.open_model("m", MHA)
            warehouse.new_epoch(model)
            first, second = rosters(warehouse)
            assert first == second
            assert first is not None
            assert [(each.name, each.epoch) for each in first.models] == [("m", turn + 1)]
            assert warehouse.check(data=True).findings == ()


def test_an_epoch_that_only_the_roster_knows_is_taken_over(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between roster and metadata."""
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
        with monkeypatch.context() as patch:

            def crash(*_: object, **__: object) -> None:
                raise DeviceError("the power goes")

            patch.setattr(Metadata, "submit", crash)
            with pytest.raises(DeviceError):
                warehouse.new_epoch(model)
    with Warehouse.open(scratch) as warehouse:
        again = warehouse.open_model("m")
        assert again.epoch == 1
        assert warehouse.lookup(again, chain_of(again, 3)) == 0
        assert warehouse.check(data=True).findings == ()


def test_metadata_older_than_the_devices_is_refused(scratch: Path) -> None:
    make_warehouse(scratch)
    old = scratch / "old.mdb"
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
    shutil.copy(scratch / "meta" / "data.mdb", old)
    with Warehouse.open(scratch) as warehouse:
        warehouse.new_epoch(warehouse.open_model("m"))
    shutil.copy(old, scratch / "meta" / "data.mdb")
    with pytest.raises(CorruptMetadata, match="twfs rebuild"):
        Warehouse.open(scratch)


def test_a_torn_roster_leaves_the_one_before(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        core = warehouse._core
        warehouse.open_model("m", MHA)
        before = core.roster
        right = Device.write_roster

        def torn(device: Device, buffer: memoryview, place: int) -> None:
            right(device, buffer[:4096], place)
            with device.path.open("r+b", buffering=0) as file:
                file.seek((4096, 512 << 10)[place] + 64)
                file.write(b"torn")
            raise DeviceError("torn")

        monkeypatch.setattr(Device, "write_roster", torn)
        with pytest.raises(DeviceError):
            warehouse.open_model("n", MHA)
        monkeypatch.undo()
        assert rosters(warehouse) == [before]
    with Warehouse.open(scratch) as warehouse:
        assert [model.name for model in warehouse.models()] == ["m"]


def test_a_lost_secret_file_is_written_again_from_the_metadata(scratch: Path) -> None:
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 2))
    kept = (scratch / SECRET_FILE).read_bytes()
    assert (scratch / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    (scratch / SECRET_FILE).unlink()
    with Warehouse.open(scratch) as warehouse:
        assert (scratch / SECRET_FILE).read_bytes() == kept
        assert read_all(warehouse, warehouse.open_model("m"), chain_of(model, 2)) == 2
