"""Quotas are never passed and cost nobody else; where space is short who holds most gives way.

A tenant at its quota makes room of its own blocks, and a put that finds none is refused with the
numbers. All of it holds at every moment, for puts at once too: the sums are watched, not sampled.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.daemon import running_daemon
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    chain_of,
    open_warehouse,
    payloads_of,
    put,
    read_all,
    settle,
)
from twfs.datapath.putting import Put
from twfs.errors import InvalidInput, NoSuchTenant, QuotaExceeded, WarehouseFull
from twfs.eviction import evicting, quotas
from twfs.index.charges import Charges
from twfs.recovery.rebuild import rebuild
from twfs.store import Model, PutOutcome, Retention
from twfs.tenants import QUOTA_BYTES_MAX, WEIGHT_MAX
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

BLOCK = 8192  # on the device
QUOTA = 64 * BLOCK


class Watched(Counter[int]):
    """A counter of bytes that looks at the quota with every change."""

    def __init__(self, charges: Charges, before: Counter[int], quota: dict[int, int]) -> None:
        super().__init__(before)
        self.charges, self.quota = charges, quota
        self.passed: list[tuple[int, int]] = []
        self.highest: Counter[int] = Counter()

    def __setitem__(self, tenant: int, value: int) -> None:
        grows = value > self[tenant]
        super().__setitem__(tenant, value)
        used = self.charges.used(tenant)
        self.highest[tenant] = max(self.highest[tenant], used)
        if grows and used > self.quota.get(tenant, 1 << 62):
            self.passed.append((tenant, used))


def watch(warehouse: Warehouse, **quota: int) -> tuple[Watched, Watched]:
    """Watch what tenants, by name, are charged from now on.

    A publish adds what is held before it takes the reservation back, in one step under the lock,
    so what is held is looked at for itself.
    """
    core, numbers = warehouse._core, warehouse.tenants()
    limits = {numbers.number_of(name): value for name, value in quota.items()}
    charges = core.charges
    charges.held = held = Watched(charges, charges.held, {})
    charges.reserved = reserved = Watched(charges, charges.reserved, limits)
    return held, reserved


@contextmanager
def with_tenants(
    directory: Path, **tenants: dict[str, Any]
) -> Iterator[tuple[Warehouse, dict[str, Model]]]:
    """A warehouse with *tenants* and a model opened for each."""
    with open_warehouse(directory) as warehouse:
        models = {}
        for name, options in tenants.items():
            warehouse.operate("tenant-add", name=name, owner=0, uids=[], **options)
            models[name] = warehouse.open_model("m", MHA, tenant=name)
        yield warehouse, models


def begin(warehouse: Warehouse, model: Model, seed: int, blocks: int) -> Put:
    """Begin a put of a chain for the tenant of *model*."""
    return warehouse.begin_put(
        model.id, chain_of(model, blocks, seed), group=0, shard=0, retention=Retention.STANDARD,
        owner=0, tenant=model.tenant,
    )  # fmt: skip


def charged(warehouse: Warehouse, model: Model) -> int:
    """Bytes that the tenant of *model* is charged for."""
    return warehouse._core.charges.held[model.tenant]


# Quotas


def test_a_tenant_at_its_quota_makes_room_of_its_own_blocks_only(scratch: Path) -> None:
    with with_tenants(scratch, acme={"quota_bytes": QUOTA}, other={}) as (warehouse, models):
        acme, other = models["acme"], models["other"]
        put(warehouse, other, chain_of(other, 100))
        _, reserved = watch(warehouse, acme=QUOTA)
        for seed in range(20):
            names = chain_of(acme, 20, seed + 1)
            assert put(warehouse, acme, names).held == 20
            assert read_all(warehouse, acme, names) == 20
            settle(warehouse)
        assert not reserved.passed
        assert reserved.highest[acme.tenant] > QUOTA - BLOCK * 20
        assert QUOTA - 2 * BLOCK <= charged(warehouse, acme) <= QUOTA
        assert warehouse.lookup(other, chain_of(other, 100)) == 100
        assert warehouse.lookup(acme, chain_of(acme, 20, 1)) == 0  # the least recently used


def test_a_put_longer_than_the_quota_keeps_a_leading_part(scratch: Path) -> None:
    with with_tenants(scratch, acme={"quota_bytes": QUOTA}) as (warehouse, models):
        acme = models["acme"]
        result = put(warehouse, acme, chain_of(acme, 100))
        assert result.held == 64
        assert set(result.outcomes[64:]) == {PutOutcome.OVER_QUOTA}
        settle(warehouse)
        assert charged(warehouse, acme) == QUOTA - BLOCK  # 1/64 is kept free ahead of demand
        counters = warehouse.statistics()["counters"]
        assert (counters["over_quota_blocks"], counters["no_room_blocks"]) == (36, 0)


def test_a_put_that_finds_nothing_to_evict_is_refused_with_the_numbers(scratch: Path) -> None:
    with with_tenants(scratch, acme={"quota_bytes": QUOTA}, other={}) as (warehouse, models):
        acme, other = models["acme"], models["other"]
        put(warehouse, other, chain_of(other, 100))
        put(warehouse, acme, chain_of(acme, 62))
        with warehouse.match(acme, chain_of(acme, 62)) as match:
            assert match.blocks == 62
            first = begin(warehouse, acme, 1, 1)
            second = begin(warehouse, acme, 2, 20)
            assert len(second.lacking) == 1
            said = (
                f"tenant acme holds {62 * BLOCK} bytes and has {2 * BLOCK} reserved of a quota of"
            )
            with pytest.raises(QuotaExceeded, match=f"{said} {QUOTA}: a block of {BLOCK}"):
                put(warehouse, acme, chain_of(acme, 20, 6))
            first.abandon()
            second.abandon()
        assert warehouse.statistics()["counters"]["refused_puts"] == 1
        assert issubclass(QuotaExceeded, WarehouseFull)  # engines treat both alike
        assert put(warehouse, acme, chain_of(acme, 20, 6)).held == 20
        assert warehouse.lookup(other, chain_of(other, 100)) == 100


def test_reservations_count_and_what_is_abandoned_comes_back(scratch: Path) -> None:
    with with_tenants(scratch, acme={"quota_bytes": QUOTA}) as (warehouse, models):
        acme = models["acme"]
        first = begin(warehouse, acme, 1, 40)
        second = begin(warehouse, acme, 2, 40)
        assert (len(first.lacking), len(second.lacking)) == (40, 24)
        with pytest.raises(QuotaExceeded, match=f"holds 0 bytes and has {QUOTA} reserved"):
            begin(warehouse, acme, 3, 1)
        first.abandon()
        third = begin(warehouse, acme, 3, 50)
        assert len(third.lacking) == 40
        second.abandon()
        third.abandon()
        assert warehouse._core.charges.used(acme.tenant) == 0


def test_puts_at_once_never_pass_a_quota(scratch: Path) -> None:
    limits = {"acme": QUOTA, "other": 3 * QUOTA // 2}
    tenants = {name: {"quota_bytes": limit} for name, limit in limits.items()}
    with with_tenants(scratch, **tenants, free={}) as (warehouse, models):
        _, reserved = watch(warehouse, **limits)
        keep = chain_of(models["free"], 50)
        put(warehouse, models["free"], keep)

        def work(name: str, first: int) -> None:
            for seed in range(first, first + 25):
                put(warehouse, models[name], chain_of(models[name], 3 + seed % 17, seed))

        threads = [
            threading.Thread(target=work, args=(name, 1000 * number))
            for number, name in enumerate(("acme", "acme", "acme", "other", "other", "other"), 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not reserved.passed
        assert warehouse.statistics()["counters"]["evicted_blocks"] > 100
        assert warehouse.lookup(models["free"], keep) == 50
        for name, limit in limits.items():
            assert charged(warehouse, models[name]) <= limit


def test_a_quota_that_is_cut_is_kept_to_in_the_background(scratch: Path) -> None:
    with with_tenants(scratch, acme={}, other={}) as (warehouse, models):
        acme, other = models["acme"], models["other"]
        for model in models.values():
            put(warehouse, model, chain_of(model, 60))
            put(warehouse, model, chain_of(model, 60, 1))
        with warehouse.match(acme, chain_of(acme, 60)):
            changed = warehouse.operate("tenant-set", name="acme", quota_bytes=32 * BLOCK)
            assert changed["quota_bytes"] == 32 * BLOCK
            settle(warehouse)
            assert charged(warehouse, acme) == 60 * BLOCK  # what is leased stays
            with pytest.raises(QuotaExceeded):
                put(warehouse, acme, chain_of(acme, 3, 9))
        evicting.keep_quotas(warehouse._core)  # as the tender does every second
        settle(warehouse)
        assert charged(warehouse, acme) == 31 * BLOCK
        assert warehouse.lookup(acme, chain_of(acme, 60)) == 31
        assert charged(warehouse, other) == 120 * BLOCK
        warehouse.operate("tenant-set", name="acme", quota_bytes=0)
        assert put(warehouse, acme, chain_of(acme, 60, 3)).held == 60


def test_a_hole_and_its_filling_are_charged_once(scratch: Path) -> None:
    with with_tenants(scratch, acme={"quota_bytes": QUOTA}) as (warehouse, models):
        acme, core = models["acme"], warehouse._core
        names = chain_of(acme, 10)
        put(warehouse, acme, names)
        info = warehouse.chain_of(acme.id, names.hash_at(9))[3]
        assert evicting.spoil(core, info.key, info.block.generation)
        assert charged(warehouse, acme) == 9 * BLOCK
        assert put(warehouse, acme, names).held == 10
        assert charged(warehouse, acme) == 10 * BLOCK


# Weights


@given(
    held=st.lists(st.integers(0, 400), min_size=2, max_size=6),
    weights=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    wanted=st.integers(0, 1000),
)
def test_who_gives_is_who_holds_most_for_its_weight(
    held: list[int], weights: list[int], wanted: int
) -> None:
    """Against taking one byte after the other from whoever holds most for its weight."""

    class Tenants:
        @staticmethod
        def weight_of(tenant: int) -> int:
            return weights[tenant]

    class Core:
        charges = Charges(lambda: 0, held=Counter(dict(enumerate(held))))
        tenants = Tenants

    given_up = dict(quotas.givers(Core, wanted))  # type: ignore[arg-type]
    left = list(held)
    for _ in range(min(wanted, sum(held))):
        left[max(range(len(left)), key=lambda tenant: left[tenant] / weights[tenant])] -= 1
    if sum(1 for each in held if each) < 2:
        assert given_up == {}
    else:
        for tenant, before in enumerate(held):
            assert abs(given_up.get(tenant, 0) - (before - left[tenant])) <= weights[tenant] + 1
        assert sum(given_up.values()) >= min(wanted, sum(held))


def test_a_flood_of_one_tenant_takes_nothing_of_those_below_their_share(scratch: Path) -> None:
    with with_tenants(scratch, small={}, flood={}) as (warehouse, models):
        small, flood = models["small"], models["flood"]
        names = chain_of(small, 300)
        put(warehouse, small, names)  # and it is never used again
        for seed in range(40):
            assert put(warehouse, flood, chain_of(flood, 100, seed)).held == 100
        assert warehouse.statistics()["counters"]["evicted_blocks"] > 1000
        assert read_all(warehouse, small, names) == 300


def test_space_is_parted_by_weight_where_all_want_it(scratch: Path) -> None:
    with with_tenants(scratch, one={}, three={"weight": 3}) as (warehouse, models):
        for seed in range(40):
            for model in models.values():
                put(warehouse, model, chain_of(model, 60, seed))
        settle(warehouse)
        ratio = charged(warehouse, models["three"]) / charged(warehouse, models["one"])
        assert 2.6 < ratio < 3.4
        assert warehouse.space().free_bytes < warehouse.space().total_bytes // 10


def test_who_may_not_give_way_is_passed_over(scratch: Path) -> None:
    with with_tenants(scratch, big={}, small={}) as (warehouse, models):
        big, small = models["big"], models["small"]
        put(warehouse, big, chain_of(big, 600))
        put(warehouse, small, chain_of(small, 100))
        with warehouse.match(big, chain_of(big, 600)):
            assert warehouse.evict(ByteCount(50 * BLOCK)) == 50 * BLOCK
        assert (charged(warehouse, big), charged(warehouse, small)) == (600 * BLOCK, 50 * BLOCK)


def test_what_no_match_reaches_goes_first_whoever_holds_it(scratch: Path) -> None:
    with with_tenants(scratch, big={}, small={}) as (warehouse, models):
        big, small = models["big"], models["small"]
        put(warehouse, big, chain_of(big, 600))
        put(warehouse, small, chain_of(small, 100).slice(50, 100))  # detached
        assert warehouse.evict(ByteCount(50 * BLOCK)) == 50 * BLOCK
        assert (charged(warehouse, big), charged(warehouse, small)) == (600 * BLOCK, 0)


# Verbs, and what lasts


@pytest.mark.parametrize(
    ("verb", "arguments", "error"),
    [
        ("add", {"name": "x", "quota_bytes": -1}, InvalidInput),
        ("add", {"name": "x", "quota_bytes": 0}, InvalidInput),
        ("add", {"name": "x", "quota_bytes": QUOTA_BYTES_MAX + 1}, InvalidInput),
        ("add", {"name": "x", "weight": 0}, InvalidInput),
        ("add", {"name": "x", "weight": WEIGHT_MAX + 1}, InvalidInput),
        ("add", {"name": "x", "weight": 1.5}, InvalidInput),
        ("add", {"name": "x", "share": "acme"}, InvalidInput),
        ("add", {"name": "x", "share": "everybody"}, InvalidInput),
        ("add", {"name": "x", "share": "Public!"}, InvalidInput),
        ("add", {"name": "public"}, InvalidInput),
        ("set", {"name": "acme", "quota_bytes": -5}, InvalidInput),
        ("set", {"name": "acme", "weight": 0}, InvalidInput),
        ("set", {"name": "acme", "share": "acme"}, InvalidInput),
        ("set", {"name": "everybody", "share": "public"}, InvalidInput),
        ("set", {"name": "public", "weight": 2}, NoSuchTenant),
        ("remove", {"name": "public"}, NoSuchTenant),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    scratch: Path, verb: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with with_tenants(scratch, acme={"share": "public"}) as (warehouse, _):
        before = warehouse._core.roster
        if verb == "add":
            arguments = {"owner": 0, "uids": [], **arguments}
        with pytest.raises(error):
            warehouse.operate(f"tenant-{verb}", **arguments)
        assert warehouse._core.roster == before


def test_quotas_weights_and_groups_survive_restart_and_lost_metadata(scratch: Path) -> None:
    options = {"quota_bytes": QUOTA, "weight": 7, "share": "public"}
    with with_tenants(scratch, acme=options, other={"share": "public"}) as (warehouse, models):
        put(warehouse, models["acme"], chain_of(models["acme"], 40))
        warehouse.operate("tenant-set", name="everybody", quota_bytes=5 * BLOCK)
        listed = list(warehouse.tenants())
        assert [each.name for each in listed] == ["everybody", "public", "acme", "other"]
    with open_warehouse(scratch) as warehouse:
        assert list(warehouse.tenants()) == listed
    for path in (scratch / "meta").iterdir():
        path.unlink()
    (scratch / "meta").rmdir()
    rebuild(scratch)
    with open_warehouse(scratch) as warehouse:
        assert list(warehouse.tenants()) == listed
        acme = warehouse.open_model("m", tenant="acme")
        assert charged(warehouse, acme) == 40 * BLOCK
        result = put(warehouse, acme, chain_of(acme, 80, 3))
        assert result.held == 64
        everybody = warehouse.open_model("m")
        assert put(warehouse, everybody, chain_of(everybody, 9)).held == 5


def test_everybody_has_a_quota_and_stays_open_to_all(scratch: Path) -> None:
    with with_tenants(scratch) as (warehouse, _):
        warehouse.operate("tenant-set", name="everybody", quota_bytes=QUOTA, weight=2)
        assert warehouse.tenants().may_act(61_234, 0)
        assert warehouse.tenants().owner_of(0) is None
        warehouse.operate("tenant-set", name="everybody", uids=[7])
        assert not warehouse.tenants().may_act(61_234, 0)
        assert warehouse.tenants().quota_of(0) == QUOTA
        warehouse.operate("tenant-set", name="everybody", anyone=True)
        assert warehouse.tenants().may_act(61_234, 0)
        assert (warehouse.tenants().quota_of(0), warehouse.tenants().weight_of(0)) == (QUOTA, 2)
        warehouse.operate("tenant-set", name="everybody", quota_bytes=0, weight=1)
        assert list(warehouse.tenants()) == []


def test_a_client_is_told_the_numbers_of_its_quota(scratch: Path) -> None:
    with running_daemon(scratch, device_bytes=DEVICE_BYTES) as daemon, daemon.client() as client:
        client.operate("tenant-add", name="acme", owner=0, uids=[], quota_bytes=QUOTA)
        model = client.open_model("m", MHA, tenant="acme")
        names = chain_of(model, 80)
        result = client.put(model, names, payloads_of(MHA, names))
        assert (result.held, result.outcomes[64]) == (64, PutOutcome.OVER_QUOTA)
        with client.match(model, names.head(50)) as match:
            assert match.blocks == 50
            client.operate("tenant-set", name="acme", quota_bytes=40 * BLOCK)
            later = chain_of(model, 2, 7)
            with pytest.raises(QuotaExceeded, match=f"quota of {40 * BLOCK}"):
                client.put(model, later, payloads_of(MHA, later))
