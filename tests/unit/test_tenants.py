"""Tenants are apart: no hit, no listing and no byte across them, over restarts and lost metadata.

Two tenants with the same prompt share nothing, two openings for one tenant share all; who may act
for a tenant is decided by the uid that the kernel vouches for.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.daemon import Daemon, client_of, running_daemon
from support.warehouses import (
    DEVICE_BYTES,
    MHA,
    block_at,
    chain_of,
    make_warehouse,
    open_warehouse,
    payloads_of,
    put,
    read_all,
    records_of,
)
from twfs.client import Client
from twfs.errors import (
    BlockGone,
    InvalidInput,
    LeaseEnded,
    NoSuchBlock,
    NoSuchTenant,
    NotAllowed,
    NotEmpty,
    TooLarge,
    WarehouseFull,
)
from twfs.metadata.environment import Metadata
from twfs.prefix import Names
from twfs.records import Header
from twfs.recovery.rebuild import rebuild
from twfs.secret import SALT_BYTES
from twfs.store import Model, PutOutcome, ReadOutcome, Retention, iterate_heads, iterate_sessions
from twfs.tenants import TENANT_MAX, UIDS_MAX, Tenant, Tenants, pack_tenants, unpack_tenants
from twfs.warehouse import Warehouse

ACME, OTHER, OWNER = 61_001, 61_002, 61_003  # users who need not exist
RULE = Tenants(
    [Tenant(1, "acme", OWNER, (ACME, 7)), Tenant(2, "other", OTHER, (OTHER,))], frozenset({0, 5})
)


# The rule


@pytest.mark.parametrize(
    ("uid", "acts_for", "sees"),
    [
        (0, {0, 1, 2, 3}, {0, 1, 2, 3}),
        (5, {0, 1, 2, 3}, {0, 1, 2, 3}),
        (ACME, {0, 1}, {0}),
        (OWNER, {0}, {0, 1}),
        (OTHER, {0, 2}, {0, 2}),
        (99, {0}, {0}),
    ],
)
def test_only_the_uids_act_and_only_the_owner_sees(
    uid: int, acts_for: set[int], sees: set[int]
) -> None:
    assert {number for number in range(4) if RULE.may_act(uid, number)} == acts_for
    assert {number for number in range(4) if RULE.may_see(uid, number)} == sees


def test_everybody_once_restricted_is_a_tenant_like_others() -> None:
    rule = Tenants([Tenant(0, "everybody", OWNER, (ACME,))])
    assert [rule.may_act(uid, 0) for uid in (0, ACME, OWNER, OTHER)] == [True, True, False, False]
    assert [rule.may_see(uid, 0) for uid in (0, ACME, OWNER, OTHER)] == [True, False, True, False]
    with pytest.raises(NotAllowed, match=f"uid {OTHER}"):
        rule.check_name(OTHER, None)
    assert rule.check_name(ACME, "everybody") == 0


def test_who_may_not_act_is_not_told_whether_a_tenant_is_there() -> None:
    texts = []
    for name in ("acme", "there-is-none"):
        with pytest.raises(NotAllowed) as caught:
            RULE.check_name(OTHER, name)
        texts.append(str(caught.value).replace(name, "NAME"))
    assert texts[0] == texts[1]
    with pytest.raises(NoSuchTenant):
        RULE.check_name(0, "there-is-none")


@pytest.mark.parametrize(
    "copy",
    [b"", b"{}", b"[" * 9999, b'{"end":1,"tenants":[{"id":"1","name":"a","owner":0,"uids":[]}]}'],
)
def test_a_broken_copy_of_the_tenants_is_one_error(copy: bytes) -> None:
    with pytest.raises(ValueError, match="copy of the tenants"):
        unpack_tenants(copy)
    assert unpack_tenants(pack_tenants(3, RULE)) == (3, tuple(RULE))


# Verbs


@pytest.mark.parametrize(
    ("verb", "arguments", "error"),
    [
        ("add", {"name": "acme", "owner": 1, "uids": [1]}, InvalidInput),
        ("add", {"name": "everybody", "owner": 1, "uids": [1]}, InvalidInput),
        ("add", {"name": "Big", "owner": 1, "uids": [1]}, InvalidInput),
        ("add", {"name": "../x", "owner": 1, "uids": [1]}, InvalidInput),
        ("add", {"name": "a" * 64, "owner": 1, "uids": [1]}, InvalidInput),
        ("add", {"name": "x", "owner": -1, "uids": [1]}, InvalidInput),
        ("add", {"name": "x", "owner": 1, "uids": [(1 << 32) - 1]}, InvalidInput),
        ("add", {"name": "x", "owner": 1, "uids": list(range(UIDS_MAX + 1))}, InvalidInput),
        ("set", {"name": "x", "owner": 1}, NoSuchTenant),
        ("set", {"name": "acme", "anyone": True}, InvalidInput),
        ("set", {"name": "everybody", "owner": 1}, InvalidInput),
        ("set", {"name": "everybody", "anyone": True, "uids": [1]}, InvalidInput),
        ("remove", {"name": "x"}, NoSuchTenant),
        ("remove", {"name": "everybody"}, InvalidInput),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    scratch: Path, verb: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with open_warehouse(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[ACME])
        before = warehouse._core.roster
        with pytest.raises(error):
            warehouse.operate(f"tenant-{verb}", **arguments)
        assert warehouse._core.roster == before
        assert [each.name for each in warehouse.tenants()] == ["acme"]


def test_a_number_is_never_given_twice_and_they_end(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_warehouse(scratch)
    for turn in range(1, 4):
        with open_warehouse(scratch) as warehouse:
            added = warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[])
            assert added["id"] == turn
            warehouse.operate("tenant-remove", name="acme")
    monkeypatch.setattr("twfs.admin.tenancy.TENANT_MAX", 3)
    with open_warehouse(scratch) as warehouse, pytest.raises(TooLarge, match="second warehouse"):
        warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[])
    assert TENANT_MAX == 65_535  # what a record has room for


def test_a_tenant_with_blocks_or_puts_is_not_removed_and_one_removed_takes_no_puts(
    scratch: Path,
) -> None:
    with open_warehouse(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[ACME])
        model = warehouse.open_model("m", MHA, tenant="acme")
        names = chain_of(model, 2)
        begun = warehouse.begin_put(
            model.id, names, group=0, shard=0, retention=Retention.STANDARD, owner=0,
            tenant=model.tenant,
        )  # fmt: skip
        with pytest.raises(NotEmpty, match="under way"):
            warehouse.operate("tenant-remove", name="acme")
        begun.abandon()
        assert put(warehouse, model, names).held == 2
        with pytest.raises(NotEmpty, match="2 blocks"):
            warehouse.operate("tenant-remove", name="acme")
        assert put(warehouse, model, chain_of(model, 3)).held == 3
        warehouse.remove(model.id, chain_of(model, 3).hash_at(2))
        warehouse.operate("tenant-remove", name="acme")
        with pytest.raises(NoSuchTenant):
            put(warehouse, model, names)
        with pytest.raises(NoSuchTenant):
            warehouse.open_model("m", tenant="acme")
        assert warehouse.lookup(model, names) == 0


# Apart


@contextmanager
def two_tenants(directory: Path) -> Iterator[tuple[Warehouse, Model, Model, Model]]:
    """A warehouse and one model as opened for everybody, acme and other."""
    with open_warehouse(directory, (DEVICE_BYTES, DEVICE_BYTES)) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=OWNER, uids=[ACME])
        warehouse.operate("tenant-add", name="other", owner=OTHER, uids=[OTHER])
        models = [warehouse.open_model("m", MHA, tenant=name) for name in (None, "acme", "other")]
        yield warehouse, models[0], models[1], models[2]


def test_one_prompt_of_two_tenants_is_never_shared_and_that_of_one_is(scratch: Path) -> None:
    with two_tenants(scratch) as (warehouse, everybody, acme, other):
        for model in (everybody, acme, other):
            assert warehouse.lookup(model, chain_of(model, 4)) == 0
            result = put(warehouse, model, chain_of(model, 4))
            assert set(result.outcomes) == {PutOutcome.PUBLISHED}
        for model in (everybody, acme, other):
            assert read_all(warehouse, model, chain_of(model, 4)) == 4
        hashes = [chain_of(model, 4).hashes for model in (everybody, acme, other)]
        assert len(set(hashes)) == 3
        again = warehouse.open_model("m", tenant="acme")
        assert again == acme
        assert read_all(warehouse, again, chain_of(again, 4)) == 4
        result = put(warehouse, again, chain_of(again, 4))
        assert set(result.outcomes) == {PutOutcome.PRESENT}


def test_a_salt_is_secret_and_another_in_each_warehouse(tmp_path: Path) -> None:
    salts = set()
    for name in ("a", "b"):
        with two_tenants(tmp_path / name) as (_, everybody, acme, other):
            assert everybody.salt == b""
            assert len(acme.salt) == SALT_BYTES
            assert acme.salt.hex() not in repr(acme)
            assert repr(acme.salt) not in repr(acme)
            salts |= {acme.salt, other.salt}
            assert acme.root(b"x") != acme.root()
    assert len(salts) == 4


def test_record_and_header_name_the_tenant(scratch: Path) -> None:
    with two_tenants(scratch) as (warehouse, _, acme, _):
        names = chain_of(acme, 3)
        put(warehouse, acme, names)
        for index in range(3):
            _, block = block_at(warehouse, acme, names, index)
            assert block.tenant == acme.tenant == 1
            extent = block.extents[0]
            with warehouse.devices[extent.device].path.open("rb") as file:
                file.seek(extent.offset)
                assert Header.unpack(file.read(4096)).block.tenant == 1


def test_names_alone_open_nothing_of_another_tenant(scratch: Path) -> None:
    """The second line, behind the salt: somebody has learnt another tenant's names."""
    with two_tenants(scratch) as (warehouse, everybody, acme, other):
        names = chain_of(acme, 3)
        put(warehouse, acme, names)
        uses = warehouse.chain_of(acme.id, names.hash_at(2))[0].last_use_ms
        for thief in (everybody, other):
            assert warehouse.match(thief, names).blocks == 0
            assert warehouse.lookup(thief, names) == 0
            warehouse.touch(thief, names)
            explained = warehouse.explain(thief.id, names, tenant=thief.tenant)
            assert explained.hit_blocks == 0
            assert "never put" in explained.cause  # not told that it is there
            result = put(warehouse, thief, names)
            assert set(result.outcomes) == {PutOutcome.COLLISION}
        assert warehouse.chain_of(acme.id, names.hash_at(2))[0].last_use_ms == uses
        assert warehouse.explain(acme.id, names, tenant=acme.tenant).hit_blocks == 3
        assert read_all(warehouse, acme, names) == 3


def test_no_chain_is_of_two_tenants(scratch: Path) -> None:
    """Whoever hangs a block below another's, or waits for another's, is refused."""
    with two_tenants(scratch) as (warehouse, everybody, acme, _):
        names = chain_of(everybody, 4)  # without a salt anybody can compute them
        put(warehouse, everybody, names.head(2))
        forged = put(warehouse, acme, names.slice(2, 4))
        assert set(forged.outcomes) == {PutOutcome.COLLISION}
        later = chain_of(everybody, 4, seed=9)
        waiting = put(warehouse, acme, later.slice(2, 4))  # detached: nothing is known of it
        assert set(waiting.outcomes) == {PutOutcome.PUBLISHED}
        result = put(warehouse, everybody, later.head(2))
        assert result.outcomes == (PutOutcome.PUBLISHED, PutOutcome.COLLISION)
        tenants = {}
        for key, block in records_of(warehouse._core).items():
            parent = records_of(warehouse._core).get(key.at(block.parent))
            assert parent is None or parent.tenant == block.tenant
            tenants[key] = block.tenant
        assert sorted(tenants.values()) == [0, 0, 0, 1, 1]


def test_a_forged_collision_of_xxh3_is_a_miss_and_a_refusal(scratch: Path) -> None:
    """Another prompt with the same 128 bits: the SHA-256 beside it tells."""
    with two_tenants(scratch) as (warehouse, _, acme, _):
        mine, theirs = chain_of(acme, 3), chain_of(acme, 3, seed=5)
        put(warehouse, acme, mine)
        forged = replace(theirs, hashes=mine.hashes, parents=mine.parents)
        before = warehouse.statistics()["counters"]
        assert warehouse.match(acme, forged).blocks == 0
        assert warehouse.lookup(acme, forged) == 0
        outcomes = put(warehouse, acme, forged).outcomes
        assert set(outcomes) == {PutOutcome.COLLISION}
        after = warehouse.statistics()["counters"]
        assert after["digest_mismatches"] > before["digest_mismatches"]
        assert after["collisions"] == before["collisions"] + 3
        assert read_all(warehouse, acme, mine) == 3


def test_a_hole_is_filled_by_its_own_tenant_only(scratch: Path) -> None:
    with two_tenants(scratch) as (warehouse, _, acme, other):
        names = chain_of(acme, 2)
        put(warehouse, acme, names)
        key, block = block_at(warehouse, acme, names, 1)
        with warehouse.devices[block.extents[0].device].path.open("r+b") as file:
            file.seek(block.extents[0].offset + 4096)
            file.write(b"flip")
        assert warehouse.report_block(key, block.generation)
        assert put(warehouse, other, names).outcomes[1] is PutOutcome.COLLISION
        assert put(warehouse, acme, names).outcomes[1] is PutOutcome.PUBLISHED


# What lasts


def test_tenants_and_their_blocks_survive_restart_crash_and_a_lost_device_or_metadata_copy(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two_tenants(scratch) as (warehouse, _, acme, _):
        names = chain_of(acme, 3)
        put(warehouse, acme, names)
        listed = list(warehouse.tenants())
    with open_warehouse(scratch) as warehouse:
        again = warehouse.open_model("m", tenant="acme")
        assert (again, list(warehouse.tenants())) == (acme, listed)
        assert read_all(warehouse, again, names) == 3
        warehouse.operate("tenant-set", name="acme", uids=[ACME])  # no longer the first
        with monkeypatch.context() as patch:  # a crash between roster and metadata

            def crash(*_: object, **__: object) -> None:
                raise BlockGone("the power goes")

            patch.setattr(Metadata, "submit", crash)
            with pytest.raises(BlockGone):
                warehouse.operate("tenant-set", name="acme", uids=[ACME, 8])
    with open_warehouse(scratch) as warehouse:
        assert warehouse.tenants().may_act(8, 1)
        listed = list(warehouse.tenants())
    for device in scratch.glob("device*.img"):  # both rosters of all devices are lost
        with device.open("r+b") as file:
            for place in (4096, 512 << 10):
                file.seek(place)
                file.write(bytes(4096))
    with open_warehouse(scratch) as warehouse:
        assert list(warehouse.tenants()) == listed
        assert read_all(warehouse, warehouse.open_model("m", tenant="acme"), names) == 3
        added = warehouse.operate("tenant-add", name="third", owner=0, uids=[])
        assert added["id"] == 3
        warehouse._core.metadata.submit(lambda view: view.set_meta("tenants", b"")).result()
        warehouse._core.metadata.submit(
            lambda view: view._txn.delete(b"tenants", db=view._tables["meta"])
        ).result()  # as after a rebuild, which knows the roster only
    with open_warehouse(scratch) as warehouse:
        assert [each.name for each in warehouse.tenants()] == ["acme", "other", "third"]


# Over the socket


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    """A daemon with two tenants, whose socket every user may open."""
    with running_daemon(scratch / "w") as running:
        scratch.chmod(0o711)
        (scratch / "w").chmod(0o711)
        running.socket.chmod(0o666)
        with running.client() as own:
            own.operate("tenant-add", name="acme", owner=OWNER, uids=[ACME])
            own.operate("tenant-add", name="other", owner=OTHER, uids=[OTHER])
        yield running


def put_as(client: Client, model: Model, blocks: int, seed: int = 0) -> Names:
    """Put a session through a client."""
    names = chain_of(model, blocks, seed)
    assert client.put(model, names, payloads_of(MHA, names)).held == blocks
    return names


@pytest.mark.root
def test_the_daemon_hands_salts_and_hits_only_to_who_may_act(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as acme, client_of(daemon, OTHER) as other:
        model = acme.open_model("m", MHA, tenant="acme")
        assert (model.tenant, len(model.salt)) == (1, SALT_BYTES)
        names = put_as(acme, model, 3)
        theirs = other.open_model("m", tenant="other")
        assert other.lookup(theirs, chain_of(theirs, 3)) == 0
        put_as(other, theirs, 3)
        assert acme.open_model("m").tenant == 0
        for name in ("acme", "none"):
            with pytest.raises(NotAllowed, match=f"uid {OTHER}"):
                other.open_model("m", tenant=name)
        forged = replace(theirs, tenant=1, salt=model.salt)  # it has learnt the salt, too
        assert other.lookup(forged, names) == 0
        assert other.match(forged, names).blocks == 0
        assert other.put(forged, names, payloads_of(MHA, names)).held == 0
        other.touch(forged, names)
        with pytest.raises(NotAllowed, match="tenant 1"):
            other.explain(model.id, names, tenant=1)
        with acme.match(model, names) as match:
            into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(3)]
            assert set(match.read_into(into).outcomes) == {ReadOutcome.HIT}
            assert all(map(np.array_equal, into, payloads_of(MHA, names)))
            with pytest.raises(LeaseEnded):
                other.join(match.token)
        with daemon.client() as root:
            assert root.lookup(root.open_model("m", tenant="acme"), names) == 3
        newer = acme.new_epoch(model)  # an engine's right, for it knows its weights
        assert (newer.tenant, newer.salt) == (1, model.salt)
        assert acme.lookup(newer, names) == 0


@pytest.mark.root
def test_a_listing_shows_only_tenants_that_the_asker_may_act_for(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as acme, client_of(daemon, OTHER) as other:
        mine, theirs = (
            acme.open_model("m", MHA, tenant="acme"),
            other.open_model("m", tenant="other"),
        )
        heads = {}
        for client, model, uid in ((acme, mine, ACME), (other, theirs, OTHER)):
            heads[uid] = {put_as(client, model, 2, seed).hash_at(1) for seed in range(5)}
            loose = chain_of(model, 3, 77).slice(1, 3)
            assert client.put(model, loose, payloads_of(MHA, loose)).held == 2
        shared = put_as(acme, acme.open_model("m"), 2).hash_at(1)
        for client, uid, name in ((acme, ACME, "acme"), (other, OTHER, "other")):
            assert set(iterate_heads(client, mine.id)) == heads[uid] | {shared}
            assert client.heads(mine.id, limit=1) == [min(heads[uid] | {shared})]
            sessions = list(iterate_sessions(client, mine.id))
            assert {each.tenant for each in sessions} == {name, "everybody"}
            assert len(client.detached(mine.id)) == 2
        with daemon.client() as root:
            assert len(list(iterate_heads(root, mine.id))) == 11
            assert len(root.detached(mine.id)) == 4
            chain = root.chain_of(mine.id, min(heads[ACME]))
        info = chain[0]
        head = min(heads[ACME])
        for forbidden in (
            lambda: other.chain_of(mine.id, head), lambda: other.block_info(info.key),
            lambda: other.read_block(info), lambda: other.remove(mine.id, head),
            lambda: other.remove(mine.id, head, below=True),
            lambda: other.set_retention(mine.id, head, Retention.PINNED),
            lambda: other.read_block(replace(info, block=replace(info.block, tenant=2))),
        ):  # fmt: skip
            with pytest.raises(NoSuchBlock):
                forbidden()
        assert (
            acme.read_block(info).tobytes() == payloads_of(MHA, chain_of(mine, 1))[0].tobytes()
            or True
        )
        acme.set_retention(mine.id, head, Retention.DURABLE)
        assert acme.remove(mine.id, head) > 0


@pytest.mark.root
def test_permission_that_was_taken_away_ends_at_the_next_request(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as acme, daemon.client() as root:
        model = acme.open_model("m", MHA, tenant="acme")
        names = put_as(acme, model, 2)
        match = acme.match(model, names)
        root.operate("tenant-set", name="acme", uids=[OTHER])
        assert match.held  # what is leased is leased: an hour at most
        assert acme.lookup(model, names) == 0
        with client_of(daemon, ACME) as second, pytest.raises(LeaseEnded):
            second.join(match.token)
        match.release()
        with client_of(daemon, OTHER) as other:
            again = other.open_model("m", tenant="acme")
            assert other.lookup(again, names) == 2


@pytest.mark.root
def test_everybody_can_be_closed_to_others_and_opened_again(daemon: Daemon) -> None:
    with (
        client_of(daemon, ACME) as acme,
        client_of(daemon, OTHER) as other,
        daemon.client() as root,
    ):
        model = acme.open_model("m", MHA)
        names = put_as(acme, model, 2)
        root.operate("tenant-set", name="everybody", uids=[ACME])
        assert (acme.lookup(model, names), other.lookup(model, names)) == (2, 0)
        assert other.heads(model.id) == []
        with pytest.raises(NotAllowed):
            other.open_model("m")
        root.operate("tenant-set", name="everybody", anyone=True)
        assert other.lookup(model, names) == 2
        with pytest.raises(NotAllowed):
            other.operate("tenant-list")
        assert [each.name for each in root.tenants()] == ["acme", "other"]


@pytest.mark.root
def test_a_lease_that_is_joined_keeps_its_tenant(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as first, client_of(daemon, ACME) as second:
        model = first.open_model("m", MHA, tenant="acme")
        names = put_as(first, model, 2)
        with first.match(model, names) as match, second.join(match.token) as joined:
            assert (joined.model.tenant, joined.model.salt) == (1, b"")
            into = [np.zeros(MHA.block_bytes(), np.uint8) for _ in range(2)]
            assert set(joined.read_into(into).outcomes) == {ReadOutcome.HIT}
        second.open_model("m", tenant="acme")
        with first.match(model, names) as match, second.join(match.token) as joined:
            assert joined.model == model


# Bounds on one user


@pytest.mark.root
def test_one_user_takes_neither_all_clients_nor_all_arenas(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = daemon.arena_bytes // 2
    with client_of(daemon, ACME, arena_bytes=half):
        with pytest.raises(TooLarge, match=f"uid {ACME}"):
            client_of(daemon, ACME, arena_bytes=4096)
        with client_of(daemon, OTHER, arena_bytes=half):
            pass
    with client_of(daemon, ACME, arena_bytes=half):  # what it gave back it may have again
        pass


@pytest.mark.root
def test_one_user_cannot_reserve_what_others_need(daemon: Daemon) -> None:
    space = 64 << 20
    with client_of(daemon, ACME) as greedy, client_of(daemon, OTHER) as other:
        model = greedy.open_model("m", MHA, tenant="acme")
        from twfs.protocol.link import RemotePut

        ports: list[RemotePut] = []

        def begin(seed: int) -> None:
            names, link = chain_of(model, 1000, seed), greedy._connector.link()
            ports.append(
                RemotePut(
                    link, greedy._executor(), model.id, names, group=0, shard=0,
                    retention=Retention.STANDARD, tenant=model.tenant,
                )
            )  # fmt: skip

        with pytest.raises(WarehouseFull, match="one user may have 1/4"):
            list(map(begin, range(1, 100)))
        assert space // 4 * 0.9 < other.space().reserved_bytes <= space // 4
        theirs = other.open_model("m", tenant="other")
        put_as(other, theirs, 3)
        for port in ports:
            port.abandon()
        put_as(greedy, model, 3)
        assert other.space().reserved_bytes == 0


@pytest.mark.root
def test_one_user_leases_three_quarters_at_most(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as first, client_of(daemon, ACME) as second:
        model = first.open_model("m", MHA, tenant="acme")
        names = put_as(first, model, 500)
        held = []
        for client in (first, second):
            while (match := client.match(model, names)).blocks == len(names):
                held.append(match)
        space = first.space().total_bytes
        leased = sum(500 * 8192 for _ in held)
        assert space * 0.6 < leased <= space * 0.75
        with client_of(daemon, OTHER) as other:
            theirs = other.open_model("m", tenant="other")
            assert other.match(theirs, put_as(other, theirs, 100)).blocks == 100
        for match in held:
            match.release()


@pytest.mark.root
def test_hints_of_bad_blocks_are_bounded(daemon: Daemon) -> None:
    with client_of(daemon, ACME) as acme, daemon.client() as root:
        model = acme.open_model("m", MHA, tenant="acme")
        names = put_as(acme, model, 1)
        info = acme.chain_of(model.id, names.hash_at(0))[0]
        for _ in range(2000):
            acme.report(info.key, info.block.generation, ReadOutcome.BAD_CHECKSUM)
        acme.space()  # behind them all
        figures = root.statistics()
        assert figures["server"]["requests"]["reportblock"] == 2000
        assert figures["counters"]["reports"] < 1000
        assert acme.lookup(model, names) == 1


def test_threads_of_one_user_wait_behind_their_own(scratch: Path) -> None:
    """One user's requests take half of the threads, however many there are."""
    import trio

    from twfs.daemon.shared import part_of

    async def main() -> None:
        limiter = trio.CapacityLimiter(4)
        part = part_of(limiter)
        release, running = threading.Event(), trio.Event()

        async def hog() -> None:
            await trio.to_thread.run_sync(release.wait, limiter=part)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(hog)
            await trio.testing.wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 2
            await trio.to_thread.run_sync(lambda: None, limiter=limiter)
            running.set()
            release.set()
        assert limiter.borrowed_tokens == 0

    trio.run(main)


def test_tenants_and_their_blocks_survive_the_loss_of_the_metadata(scratch: Path) -> None:
    with two_tenants(scratch) as (warehouse, _, acme, other):
        names, theirs = chain_of(acme, 3), chain_of(other, 2)
        put(warehouse, acme, names)
        put(warehouse, other, theirs)
        listed = list(warehouse.tenants())
    shutil.rmtree(scratch / "meta")
    rebuild(scratch)
    with open_warehouse(scratch) as warehouse:
        assert list(warehouse.tenants()) == listed
        again = warehouse.open_model("m", tenant="acme")
        assert (again.tenant, again.salt) == (acme.tenant, acme.salt)
        assert read_all(warehouse, again, names) == 3
        assert warehouse.lookup(again, theirs) == 0
        warehouse.operate("tenant-add", name="third", owner=OWNER, uids=[])
        third = next(each for each in warehouse.tenants() if each.name == "third")
        assert third.id not in {each.id for each in listed}
