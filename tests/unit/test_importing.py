"""A pending import keeps what was written, in whatever order, and lets go of everything it held."""

import random
from pathlib import Path

import pytest

from support.warehouses import MHA, chain_of, open_warehouse, payload_of, put_whole
from twfs.errors import BlockGone, InvalidInput, NoSpaceForImage, TooLarge
from twfs.prefix import Names
from twfs.store import Model
from twfs.units import PrefixHash
from twfs.vfs.chainfile import CHAIN_NAME, write_chain
from twfs.vfs.importing import PENDINGS_MAX, Importer, Pending, PendingState
from twfs.vfs.spool import Spool
from twfs.warehouse import Warehouse


def test_spool_reads_like_a_sparse_file(tmp_path: Path) -> None:
    spool, chance = Spool(tmp_path, 5000), random.Random(4)
    assert list(tmp_path.iterdir()) == [], "the spool has no name"
    for _ in range(3):  # regions are used again: what another file wrote must not shine through
        regions = [spool.take() for _ in range(3)]
        models = [bytearray() for _ in regions]
        for _ in range(200):
            which, at = chance.randrange(3), chance.randrange(4000)
            data = chance.randbytes(chance.randrange(1, 900))
            model = models[which]
            spool.write(regions[which], at, data, len(model))
            model.extend(bytes(max(0, at + len(data) - len(model))))
            model[at : at + len(data)] = data
            assert spool.read(regions[which], 0, len(model)) == model
            if chance.random() < 0.1:
                del model[chance.randrange(len(model) + 1) :]
        for region in regions:
            spool.give_back(region)
    spool.close()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def state_of(pending: Pending) -> PendingState:
    return pending.state


def exported(warehouse: Warehouse, blocks: int = 3) -> tuple[Model, Names, dict[str, bytes]]:
    """The files of a session that is not in the store any more."""
    model = warehouse.open_model("m", MHA)
    names = chain_of(model, blocks)
    put_whole(warehouse, model, names)
    head = names.hash_at(blocks - 1)
    text = write_chain(warehouse.models()[0], head, warehouse.chain_of(model.id, head))
    warehouse.remove(model.id, head)
    files = {
        f"{index:05d}.kv": payload_of(MHA, names.hash_at(index)).tobytes()
        for index in range(blocks)
    }
    return model, names, {**files, CHAIN_NAME: text}


@pytest.mark.parametrize("seed", range(5))
def test_files_may_come_in_any_order_and_in_any_pieces(scratch: Path, seed: int) -> None:
    chance = random.Random(seed)
    with open_warehouse(scratch) as warehouse:
        model, names, files = exported(warehouse)
        importer = Importer(warehouse, scratch)
        pending = importer.open(warehouse.models()[0], names.hash_at(2))
        order = list(files)
        chance.shuffle(order)
        for name in order:
            assert state_of(pending) is PendingState.OPEN
            file, data = importer.create(pending, name), files[name]
            importer.settle(file)  # a shell closes its copy of a file before it writes
            cuts = sorted(chance.sample(range(1, len(data)), 5))
            pieces = list(zip([0, *cuts], [*cuts, len(data)], strict=True))
            chance.shuffle(pieces)
            for start, end in pieces:
                importer.write(file, start, data[start:end])
            importer.settle(file)
        assert state_of(pending) is PendingState.PUBLISHED
        assert warehouse.lookup(model, names) == 3
        assert importer.statistics() == {
            "pending": 0, "pending_bytes": 0, "published": 1, "dropped": 0, "blocks": 3,
        }  # fmt: skip


def test_half_written_file_is_not_judged(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        _, names, files = exported(warehouse)
        importer = Importer(warehouse, scratch)
        pending = importer.open(warehouse.models()[0], names.hash_at(2))
        for name in (CHAIN_NAME, "00000.kv", "00001.kv"):
            file = importer.create(pending, name)
            importer.write(file, 0, files[name])
            importer.settle(file)
        last, data = importer.create(pending, "00002.kv"), files["00002.kv"]
        importer.write(last, 0, data[:100])
        importer.settle(last)
        assert state_of(pending) is PendingState.OPEN
        importer.write(last, 100, data[100:])
        importer.settle(last)
        assert state_of(pending) is PendingState.PUBLISHED


def test_untrue_bytes_drop_the_whole_import(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names, files = exported(warehouse)
        importer = Importer(warehouse, scratch)
        pending = importer.open(warehouse.models()[0], names.hash_at(2))
        for name in ("00000.kv", CHAIN_NAME):
            file = importer.create(pending, name)
            importer.write(file, 0, files[name])
            importer.settle(file)
        file = importer.create(pending, "00001.kv")
        importer.write(file, 0, bytes(len(files["00001.kv"])))
        with pytest.raises(InvalidInput, match="checksum"):
            importer.settle(file)
        assert state_of(pending) is PendingState.DROPPED
        assert importer.pending(model.id, names.hash_at(2)) is None
        assert warehouse.lookup(model, names) == 0
        with pytest.raises(BlockGone):
            importer.write(file, 0, b"x")


def test_abandoned_import_is_dropped_and_a_used_one_is_not(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        _, names, _ = exported(warehouse)
        importer = Importer(warehouse, scratch)
        pending = importer.open(warehouse.models()[0], names.hash_at(2))
        assert importer.drop_idle(idle_seconds=3600) == 0
        assert importer.drop_idle(idle_seconds=0) == 1
        assert state_of(pending) is PendingState.DROPPED
        importer.open(warehouse.models()[0], names.hash_at(2))
        importer.close()


def test_imports_are_bounded(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        exported(warehouse)
        info = warehouse.models()[0]
        importer = Importer(warehouse, scratch, spool_bytes_max=5000)
        before = descriptors()
        pendings = [
            importer.open(info, PrefixHash(number.to_bytes(16, "big")))
            for number in range(PENDINGS_MAX)
        ]
        with pytest.raises(TooLarge):
            importer.open(info, PrefixHash(b"\xff" * 16))
        for number, pending in enumerate(pendings[:3]):
            file = importer.create(pending, "00000.kv")
            if number < 2:
                importer.write(file, 0, bytes(2048))
            else:
                with pytest.raises(NoSpaceForImage):
                    importer.write(file, 0, bytes(2048))
        importer.close()
        assert importer.statistics()["pending_bytes"] == 0
        assert descriptors() == before


def test_rename_completes_what_rsync_brought(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model, names, files = exported(warehouse)
        importer = Importer(warehouse, scratch)
        pending = importer.open(warehouse.models()[0], names.hash_at(2))
        for name, data in files.items():
            coming = f".{name}.Ab3dEf"
            file = importer.create(pending, coming)
            importer.write(file, 0, data)
            importer.settle(file)
            importer.rename(pending, coming, name)
        assert state_of(pending) is PendingState.PUBLISHED
        assert warehouse.lookup(model, names) == 3
