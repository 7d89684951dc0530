"""`twfs du` adds up to what is used, to the byte, and says who uses what alone and what is shared.

Each sum is compared with one made block by block from the tables, whatever lies on the devices:
shards and groups, detached blocks, holes and retired space, limbo, puts under way.
"""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from support.cli import assert_refused, document, made_warehouse, twfs
from support.warehouses import (
    DEVICE_BYTES,
    LAYOUTS,
    MHA,
    block_at,
    chain_of,
    open_warehouse,
    payloads_of,
    put,
    put_whole,
    records_of,
    settle,
    upload_all,
)
from twfs.admin import usage
from twfs.admin.usage import By, Row, Usage
from twfs.core.state import Core
from twfs.eviction import evicting
from twfs.records import BlockKey
from twfs.units import ALIGN
from twfs.warehouse import Warehouse


def all_usages(core: Core) -> dict[By, Usage]:
    """The answer for each kind of rows; each adds up."""
    found = {by: usage.usage(core, by) for by in By}
    for each in found.values():
        assert each.adds_up, each
    return found


def rows_of(found: Usage) -> dict[str, Row]:
    return {row.name: row for row in found.rows}


def sessions_of(warehouse: Warehouse) -> dict[str, tuple[int, int]]:
    """Exclusive and shared bytes of each head, counted block by block."""
    core = warehouse._core
    over: dict[tuple[int, bytes], set[bytes]] = defaultdict(set)
    sizes: Counter[tuple[int, bytes]] = Counter()
    for key, block in records_of(core).items():
        sizes[key.model, key.prefix_hash] += block.device_bytes
    chains: dict[str, list[tuple[int, bytes]]] = {}
    for info in warehouse.models():
        for head in warehouse.heads(info.id):
            chain = {i.key.prefix_hash for i in warehouse.chain_of(info.id, head)}
            chains[head.hex()] = [(info.id, name) for name in chain]
            for place in chains[head.hex()]:
                over[place].add(head)
    return {
        head: (
            sum(sizes[place] for place in chain if len(over[place]) == 1),
            sum(sizes[place] for place in chain if len(over[place]) > 1),
        )
        for head, chain in chains.items()
    }


def test_all_that_lies_on_the_devices_is_in_one_sum(scratch: Path) -> None:
    with open_warehouse(scratch, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        core = warehouse._core
        empty = all_usages(core)[By.TENANT]
        assert (empty.rows, empty.used_bytes, empty.blocks) == ([], 0, 0)
        for name in ("acme", "other"):
            warehouse.operate("tenant-add", name=name, owner=0, uids=[])
        for tenant in ("acme", "other", None):
            for name, layout in LAYOUTS.items():
                model = warehouse.open_model(name, layout, tenant=tenant)
                for seed in (0, 1, 2):
                    put_whole(warehouse, model, chain_of(model, 9, seed, fork=4))
        plain = warehouse.open_model("mha", tenant="acme")
        put(warehouse, plain, chain_of(plain, 6, 70).slice(3, 6))  # detached
        lost = chain_of(plain, 9, 0, fork=4)
        key, block = block_at(warehouse, plain, lost, 6)
        assert evicting.spoil(core, key, block.generation)
        leased = chain_of(plain, 9, 1, fork=4)
        begun = upload_all(warehouse, warehouse.open_model("mha"), chain_of(plain, 5, 80))
        with warehouse.match(plain, leased):
            warehouse.remove(plain.id, leased.hash_at(8))
            settle(warehouse)
            found = all_usages(core)
            lines = found[By.TENANT]
            space = warehouse.space()
            assert lines.used_bytes == space.total_bytes - space.free_bytes
            assert (lines.transit_bytes, lines.leaving_bytes) == (0, 0)
            assert lines.limbo_bytes == 5 * 8192
            assert lines.retired_bytes == 8192
            assert lines.reserved_bytes == 5 * 8192
        records = records_of(core)
        assert lines.blocks == len(records)
        whole = [block for block in records.values() if not block.hole]
        assert lines.payload_bytes == sum(block.payload_bytes for block in whole)
        assert lines.header_bytes == ALIGN * len(whole)
        held: Counter[str] = Counter()
        models: Counter[str] = Counter()
        for key, block in records.items():
            held[warehouse.tenants().name_of(block.tenant)] += block.device_bytes
            models[core.models[key.model].name] += block.device_bytes
        assert {row.name: row.exclusive_bytes for row in found[By.TENANT].rows} == held
        assert {row.name: row.exclusive_bytes for row in found[By.MODEL].rows} == models
        sessions = {
            row.name: (row.exclusive_bytes, row.shared_bytes) for row in found[By.SESSION].rows
        }
        assert sessions == sessions_of(warehouse)
        assert found[By.SESSION].no_session_bytes >= 3 * 8192
        assert found[By.SESSION].shared_once_bytes > 0
        begun.abandon()
        settle(warehouse)
        again = all_usages(core)[By.TENANT]
        assert (again.limbo_bytes, again.reserved_bytes) == (0, 0)


def test_sums_hold_after_a_restart_and_an_epoch_that_is_over_has_its_own_row(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 20))
        before = all_usages(warehouse._core)
    with open_warehouse(scratch) as warehouse:
        assert all_usages(warehouse._core) == before
        with warehouse.match(model, chain_of(model, 20)):
            newer = warehouse.new_epoch(model)
            put(warehouse, newer, chain_of(newer, 3))
            found = rows_of(all_usages(warehouse._core)[By.MODEL])
            assert found["m"].blocks == 3
            assert found["m (epoch 0, over)"].blocks == 20


def test_the_largest_rows_are_shown_and_the_rest_is_one_sum(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in range(1, 8):
            put(warehouse, model, chain_of(model, 3 + seed, seed, fork=2))
        for by in By:
            assert usage.usage(warehouse._core, by, 1).adds_up
        found = usage.usage(warehouse._core, By.SESSION, 2)
        assert [row.blocks for row in found.rows] == [10, 9]
        assert (found.other_rows, found.shared_once_bytes) == (5, 2 * 8192)
        assert found.other_bytes == sum(1 + seed for seed in range(1, 6)) * 8192
        assert [row.tokens for row in found.rows] == [160, 144]


def test_it_adds_up_at_every_moment_of_a_busy_warehouse(scratch: Path) -> None:
    """Between the steps of publishes, evictions and the ends of leases, too."""
    import threading

    with open_warehouse(scratch) as warehouse:
        model, core = warehouse.open_model("m", MHA), warehouse._core
        ended = threading.Event()

        def work(first: int) -> None:
            for seed in range(first, first + 15):
                names = chain_of(model, 50, seed)
                put(warehouse, model, names)
                with warehouse.match(model, names.head(20)):
                    warehouse.evict(40 * 8192)  # type: ignore[arg-type]

        workers = [threading.Thread(target=work, args=(1000 * n,)) for n in (1, 2)]
        for worker in workers:
            worker.start()
        looks = 0
        while not ended.is_set():
            found = all_usages(core)
            looks += 1
            for each in found.values():
                assert 0 <= each.block_bytes <= each.total_bytes
            if not any(worker.is_alive() for worker in workers):
                ended.set()
        for worker in workers:
            worker.join()
        assert looks > 1
        settle(warehouse)
        assert all_usages(core)[By.TENANT].transit_bytes == 0


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A warehouse of two tenants' sessions."""
    made = made_warehouse(tmp_path / "tw")
    assert twfs("tenant", "add", made, "acme").returncode == 0
    with Warehouse.open(made) as warehouse:
        for tenant, blocks in (("acme", 7), (None, 2)):
            model = warehouse.open_model("m", MHA, tenant=tenant)
            for seed in (1, 2):
                names = chain_of(model, blocks + 2, seed, fork=2)
                assert warehouse.put(model, names, payloads_of(MHA, names)).held == blocks + 2
    return made


def test_du_prints_tenants_models_and_sessions(made: Path) -> None:
    found = document("du", made)
    rows = {row["name"]: row for row in found["rows"]}
    assert (rows["acme"]["blocks"], rows["everybody"]["blocks"]) == (16, 6)
    assert sum(row["exclusive_bytes"] for row in found["rows"]) == found["used_bytes"]
    space = document("status", made)["space"]
    assert found["used_bytes"] == space["total_bytes"] - space["free_bytes"]
    sessions = document("du", made, "--by", "session")
    assert len(sessions["rows"]) == 4
    assert {row["tenant"] for row in sessions["rows"]} == {"acme", "everybody"}
    own = sum(row["exclusive_bytes"] for row in sessions["rows"])
    assert own + sessions["shared_once_bytes"] == found["used_bytes"]
    heads = {row["head"] for row in document("ls", made)["models"][0]["sessions"]}
    assert {row["name"] for row in sessions["rows"]} == heads
    text = twfs("du", made, "--by", "session", "--top", "1").stdout
    assert "and 3 others" in text
    assert "in several sessions, counted once: 32.0 KiB" in text
    assert "used of the devices" in text
    assert_refused(twfs("du", made, "--by", "planet"), 2)


def test_a_standing_block_is_found_for_every_group_and_shard(scratch: Path) -> None:
    """Against the names: what has none, its standing block not having come, is in no session."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("sharded", LAYOUTS["sharded"])
        names = chain_of(model, 6)
        put(warehouse, model, names, shard=1)  # shard 0 stands for a name, and has not come
        core = warehouse._core
        assert all_usages(core)[By.SESSION].no_session_bytes == 6 * 8192
        put(warehouse, model, names.head(4), shard=0)
        found = all_usages(core)[By.SESSION]
        assert found.no_session_bytes == 2 * 8192
        assert [row.blocks for row in found.rows] == [8]
        assert BlockKey(model.id, names.hash_at(3), 0, 0).prefix_hash.hex() == found.rows[0].name
