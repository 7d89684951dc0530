"""What tenants are metered: byte-hours on the warehouse's clock, tokens served, prefill spared.

Each sum is compared with one made by hand, over restarts and crashes, and through the socket.
"""

from pathlib import Path
from typing import Any

import pytest

from support.daemon import running_daemon
from support.warehouses import (
    BLOCK_TOKENS,
    MHA,
    SHARDED,
    chain_of,
    open_warehouse,
    payloads_of,
    put,
    put_whole,
    read_all,
    settle,
    stop_tending,
)
from twfs import config
from twfs.core import metering
from twfs.errors import InvalidInput
from twfs.metadata.meter import META, Meter
from twfs.store import Retention
from twfs.units import ByteCount, Millis
from twfs.vfs.describing import metrics
from twfs.warehouse import Warehouse

BLOCK = 8192  # on the device
HOUR = 3_600_000


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def __call__(self) -> Millis:
        return Millis(self.now_ms)


def rows(warehouse: Warehouse) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What is metered, by tenant, model and class."""
    found = warehouse.statistics()["tenants"]["metered"]
    return {(row["tenant"], row["model"], row["class"]): row for row in found}


def test_byte_hours_are_what_was_held_times_how_long(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        warehouse.operate("tenant-add", name="acme", owner=0, uids=[])
        acme, everybody = warehouse.open_model("m", MHA, tenant="acme"), warehouse.open_model("m")
        put(warehouse, acme, chain_of(acme, 10))
        clock.now_ms += HOUR
        put(warehouse, everybody, chain_of(everybody, 4), retention=Retention.EPHEMERAL)
        clock.now_ms += HOUR // 2
        found = rows(warehouse)
        assert found["acme", "m", "standard"]["byte_hours"] == pytest.approx(15 * BLOCK)
        assert found["everybody", "m", "ephemeral"]["byte_hours"] == pytest.approx(2 * BLOCK)
        warehouse.remove(acme.id, chain_of(acme, 10).hash_at(9))
        clock.now_ms += 3 * HOUR
        found = rows(warehouse)
        assert found["acme", "m", "standard"]["byte_hours"] == pytest.approx(15 * BLOCK)
        assert found["everybody", "m", "ephemeral"]["byte_hours"] == pytest.approx(14 * BLOCK)
        clock.now_ms -= HOUR  # a clock that goes back takes nothing away, and counts nothing twice
        assert rows(warehouse) == found
        clock.now_ms += HOUR
        assert rows(warehouse) == found


def test_another_class_counts_from_when_it_was_given(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        clock.now_ms += HOUR
        warehouse.set_retention(model.id, names.hash_at(5), Retention.DURABLE)
        clock.now_ms += HOUR
        found = rows(warehouse)
        assert found["everybody", "m", "standard"]["byte_hours"] == pytest.approx(6 * BLOCK)
        assert found["everybody", "m", "durable"]["byte_hours"] == pytest.approx(6 * BLOCK)


def test_tokens_served_are_what_matches_gave_and_reads_what_was_delivered(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=0, uids=[])
        model = warehouse.open_model("m", SHARDED, tenant="acme")
        names = chain_of(model, 8)
        put_whole(warehouse, model, names.head(6))
        assert read_all(warehouse, model, names) == 6
        assert read_all(warehouse, model, names, start=2) == 6  # it had two blocks itself
        warehouse.lookup(model, names)  # asks, and is not served
        (row,) = rows(warehouse).values()
        assert (row["served_blocks"], row["served_tokens"]) == (10, 10 * BLOCK_TOKENS)
        assert row["prefill_seconds_saved"] is None
        (reads,) = warehouse.statistics()["tenants"]["reads"]
        assert (reads["tenant"], reads["model"]) == ("acme", "m")
        assert reads["read_blocks"] == 2 * 10  # of both shards
        assert reads["read_bytes"] == 20 * SHARDED.block_bytes()


def test_prefill_saved_is_by_the_rate_that_is_given_else_measured(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 10)
        put(warehouse, model, names)
        assert read_all(warehouse, model, names) == 10
        warehouse.count_prefill(model, 4000, 2.0)
        warehouse.count_prefill(model, 4000, 6.0)
        (row,) = rows(warehouse).values()
        assert row["prefill_seconds_saved"] == pytest.approx(160 / 1000)
        for _ in range(50):  # a new kind of GPU: what was measured before fades
            warehouse.count_prefill(model, 400_000, 4.0)
        rate = warehouse.statistics()["tenants"]["prefill_rates"]["m"]
        assert rate["rate_is"] == "measured"
        assert rate["tokens_per_s"] == pytest.approx(100_000, rel=0.01)
        for tokens, seconds in ((0, 1.0), (1, 0.0), (1, -1.0), (1 << 40, 1.0), (1, float("nan"))):
            with pytest.raises(InvalidInput):
                warehouse.count_prefill(model, tokens, seconds)
    for given, wanted in (('m = 320.0\n"*" = 1.0', 320.0), ('"*" = 16', 16.0)):
        (scratch / "twfs.toml").write_text(f"[prefill]\n{given}\n")
        with open_warehouse(scratch) as warehouse:
            (row,) = rows(warehouse).values()
            assert row["prefill_seconds_saved"] == pytest.approx(160 / wanted)
    for bad in ("m = 0", 'm = "fast"', "m = -1"):
        with pytest.raises(InvalidInput, match="prefill"):
            config.parse(f"[prefill]\n{bad}\n".encode())


def test_sums_go_on_over_restarts_and_a_crash_loses_little(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 10))
        read_all(warehouse, model, chain_of(model, 10))
        clock.now_ms += HOUR
        before = rows(warehouse)
        since = warehouse.statistics()["tenants"]["metered_since_ms"]
    clock.now_ms += 5 * HOUR  # it is held while nobody has it open, and nobody can see that it was
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        assert rows(warehouse) == before
        assert warehouse.statistics()["tenants"]["metered_since_ms"] == since
        clock.now_ms += HOUR
        metering.persist(warehouse._core).result()  # as the tender does every 20 s
        clock.now_ms += 19_000
        last = rows(warehouse)["everybody", "m", "standard"]["byte_hours"]
        with warehouse._core.metadata.read() as view:
            kept = Meter.load(view.meta(META), 0)  # what a crash here would leave
        (sums,) = kept.sums.values()
        assert sums.byte_ms / HOUR == pytest.approx(2 * 10 * BLOCK)
        assert last - sums.byte_ms / HOUR == pytest.approx(10 * BLOCK * 19 / 3600)
        assert metering.PERSIST_S == 20


@pytest.mark.parametrize("copy", [b"", b"{}", b"[[[", b'{"since_ms":1,"rows":[["x"]]}'])
def test_an_unreadable_meter_begins_anew(scratch: Path, copy: bytes) -> None:
    assert Meter.load(copy, 7) == Meter(7)
    kept = Meter(3)
    assert Meter.load(kept.pack(), 7) == kept


def test_what_a_model_had_stays_when_its_epoch_has_gone(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        from twfs.eviction import evicting

        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 10))
        clock.now_ms += HOUR
        warehouse.new_epoch(model)
        evicting.sweep_epochs(warehouse._core)
        assert model.id not in warehouse._core.models
        (row,) = rows(warehouse).values()
        assert (row["model"], row["byte_hours"]) == ("m", pytest.approx(10 * BLOCK))


def test_metrics_have_tenant_model_and_class_as_labels(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        for name in ("a.b", "a-b"):
            warehouse.operate("tenant-add", name=name, owner=0, uids=[], quota_bytes=1 << 20)
            model = warehouse.open_model("m", MHA, tenant=name)
            put(warehouse, model, chain_of(model, 3))
            read_all(warehouse, model, chain_of(model, 3))
        clock.now_ms += HOUR
        warehouse.count_prefill(model, 480, 1.0)
        lines = metrics(warehouse.statistics()).decode().splitlines()
    assert 'twfs_tenant_held_bytes{tenant="a.b"} 24576' in lines
    assert 'twfs_tenant_quota_bytes{tenant="a-b"} 1048576' in lines
    labels = 'tenant="a-b",model="m",class="standard"'
    assert f"twfs_tenant_served_tokens{{{labels}}} 48" in lines
    assert f"twfs_tenant_byte_hours{{{labels}}} 24576.0" in lines
    assert f"twfs_tenant_prefill_seconds_saved{{{labels}}} 0.1" in lines
    assert 'twfs_tenant_tokens_per_s{model="m",rate_is="measured"} 480.0' in lines
    assert 'twfs_tenant_read_blocks{tenant="a.b",model="m"} 3' in lines
    assert not any(line.startswith("twfs_tenants") for line in lines)


def test_clients_are_metered_and_report_what_prefill_takes(scratch: Path) -> None:
    with running_daemon(scratch) as daemon, daemon.client() as client:
        model = client.open_model("m", MHA)
        names = chain_of(model, 5)
        assert client.put(model, names, payloads_of(MHA, names)).held == 5
        with client.match(model, names) as match:
            assert match.blocks == 5
        client.count_prefill(model, 800, 1.0)
        client.space()  # behind it
        figures = client.statistics()["tenants"]
        (row,) = figures["metered"]
        assert row["served_tokens"] == 80
        assert row["prefill_seconds_saved"] == pytest.approx(0.1)
        with pytest.raises(InvalidInput):
            client.count_prefill(model, -1, 1.0)
        daemon.stop()
        daemon.start()
        with daemon.client() as again:
            (row,) = again.statistics()["tenants"]["metered"]
            assert row["served_tokens"] == 80


def test_an_eviction_ends_what_is_metered(scratch: Path) -> None:
    clock = Clock()
    with open_warehouse(scratch, clock=clock) as warehouse:
        stop_tending(warehouse)
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 10))
        clock.now_ms += HOUR
        warehouse.evict(ByteCount(4 * BLOCK))
        settle(warehouse)
        clock.now_ms += HOUR
        (row,) = rows(warehouse).values()
        assert row["byte_hours"] == pytest.approx(16 * BLOCK)
