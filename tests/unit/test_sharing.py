"""Share groups: public prompts are there once for all members, and charged to one of them.

Private blocks stay apart, also those that go on from public ones; who is in no group, or in
another, reaches nothing. The charge passes when the payer lets go, in the record, and never past
a quota.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.daemon import client_of, running_daemon
from support.warehouses import (
    BLOCK_TOKENS,
    MHA,
    SHARDED,
    block_at,
    commits_held,
    open_warehouse,
    payloads_of,
    put,
    put_whole,
    read_all,
    records_of,
    settle,
    tokens_of,
)
from twfs.admin import usage
from twfs.admin.usage import By
from twfs.errors import InvalidInput, NoSuchBlock, NoSuchTenant, NotAllowed, NotEmpty, QuotaExceeded
from twfs.eviction import evicting, quotas, sharing
from twfs.prefix import Names, OwnKey, names_of_keys
from twfs.recovery.rebuild import rebuild
from twfs.store import Model, PutOutcome, Retention
from twfs.warehouse import Warehouse

BLOCK = 8192  # on the device
ACME, OTHER, THIRD = 61_001, 61_002, 61_003  # users who need not exist


@contextmanager
def group(
    directory: Path, *, layout: Any = MHA, **options: dict[str, Any]
) -> Iterator[tuple[Warehouse, Model, Model, Model]]:
    """A warehouse: acme and other are in the group public, third is in none."""
    with open_warehouse(directory) as warehouse:
        models = []
        for name in ("acme", "other", "third"):
            share = {} if name == "third" else {"share": "public"}
            given = {**share, **options.get(name, {})}
            warehouse.operate("tenant-add", name=name, owner=0, uids=[], **given)
            models.append(warehouse.open_model("m", layout, tenant=name))
        yield warehouse, models[0], models[1], models[2]


def chain(model: Model, public: int, private: int = 0, seed: int = 0, secret: int = 99) -> Names:
    """Names of so many public blocks, and of private ones that go on from them."""
    made = model.chain(public_tokens=public * BLOCK_TOKENS).extend(tokens_of(public, seed))
    return made.extend(tokens_of(private, secret)).names()


def charged(warehouse: Warehouse) -> dict[str, int]:
    """Blocks that each is charged for, by name."""
    core = warehouse._core
    return {
        core.tenants.name_of(number): core.charges.held[number] // BLOCK
        for number in core.charges.holders()
        if core.charges.held[number]
    }


# Names


def test_public_beginnings_have_the_same_names_and_nothing_else_has(scratch: Path) -> None:
    with group(scratch) as (_, acme, other, third):
        mine, theirs = chain(acme, 3, 3), chain(other, 3, 3)
        assert (mine.public, len(mine)) == (3, 6)
        assert mine.head(3) == theirs.head(3)
        assert {mine.hash_at(i) for i in range(3, 6)}.isdisjoint(
            theirs.hash_at(i) for i in range(6)
        )
        assert acme.chain().extend(tokens_of(3)).names().hashes != mine.head(3).hashes
        assert [mine.slice(a, b).public for a, b in ((0, 6), (1, 6), (2, 4), (3, 6), (0, 2))] == [
            3, 2, 1, 0, 2,
        ]  # fmt: skip
        with pytest.raises(InvalidInput, match="without a share group"):
            third.chain(public_tokens=64)
        assert third.chain(public_tokens=15).extend(tokens_of(1)).names().public == 0
        for model in (acme, other):
            assert model.public_salt.hex() not in repr(model)
            assert repr(model.public_salt) not in repr(model)
        keys = [OwnKey(b"a"), OwnKey(b"b", b"a")]
        own = [names_of_keys(m.root(public=True), keys, public=True) for m in (acme, other)]
        assert own[0] == own[1]
        assert own[0].public == 2


def test_a_chain_that_grows_bit_by_bit_has_the_names_of_one_made_at_once(scratch: Path) -> None:
    with group(scratch) as (_, acme, _, _):
        tokens = tokens_of(8)
        whole = acme.chain(public_tokens=70).extend(tokens)
        grown = acme.chain(public_tokens=70)
        for at in range(0, len(tokens), 7):
            grown.extend(tokens[at : at + 7])
        assert grown.names() == whole.names()
        assert whole.names().public == 4
        extra = acme.chain(public_tokens=70).extend(tokens, [b"x"] * 8).names()
        assert all(extra.hash_at(i) != whole.names().hash_at(i) for i in range(8))


# Who reaches what


def test_a_public_beginning_is_stored_once_and_read_by_all_members(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, other, third):
        assert set(put(warehouse, acme, chain(acme, 4, 2)).outcomes) == {PutOutcome.PUBLISHED}
        theirs = chain(other, 4, 3)
        assert warehouse.lookup(other, theirs) == 4
        assert read_all(warehouse, other, theirs) == 4
        outcomes = put(warehouse, other, theirs).outcomes
        assert outcomes.count(PutOutcome.PRESENT) == 4
        assert outcomes.count(PutOutcome.PUBLISHED) == 3
        assert read_all(warehouse, other, theirs) == 7
        assert read_all(warehouse, acme, chain(acme, 4, 2)) == 6
        assert charged(warehouse) == {"acme": 6, "other": 3}
        by = {row.name: row for row in usage.usage(warehouse._core, By.TENANT).rows}
        assert (by["acme"].exclusive_bytes, by["acme"].shared_bytes) == (2 * BLOCK, 4 * BLOCK)
        everybody = warehouse.open_model("m")
        for outsider in (third, everybody):
            stolen = chain(acme, 4, 2)  # it has learnt the names, even the group's salt
            assert warehouse.lookup(outsider, stolen) == 0
            assert warehouse.match(outsider, stolen).blocks == 0
            private = replace(stolen, public=0)
            assert set(put(warehouse, outsider, private).outcomes) == {PutOutcome.COLLISION}
            with pytest.raises(InvalidInput, match="no share group"):
                put(warehouse, outsider, chain(acme, 4, 0, seed=5))


def test_a_member_never_reaches_what_another_keeps_private(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, other, _):
        secret = chain(acme, 2, 4)
        put(warehouse, acme, secret)
        assert warehouse.lookup(other, secret) == 2  # with all its names: only what is public
        assert warehouse.match(other, secret).blocks == 2
        explained = warehouse.explain(other.id, secret, tenant=other.tenant)
        assert explained.hit_blocks == 2
        assert "never put" in explained.cause
        forged = put(warehouse, other, secret)
        assert set(forged.outcomes[2:]) == {PutOutcome.COLLISION}
        as_public = replace(secret, public=6)  # or said to be the group's
        assert set(put(warehouse, other, as_public).outcomes[2:]) == {PutOutcome.COLLISION}
        below = chain(acme, 2, 6).slice(6, 8)  # it hangs a block of its own below acme's
        assert set(put(warehouse, other, replace(below, public=0)).outcomes) == {
            PutOutcome.COLLISION
        }
        assert set(put(warehouse, other, replace(below, public=2)).outcomes) == {
            PutOutcome.COLLISION
        }
        assert read_all(warehouse, acme, secret) == 6


def test_parts_of_a_mixed_chain_come_in_any_order(scratch: Path) -> None:
    with group(scratch, layout=SHARDED) as (warehouse, acme, other, _):
        names, theirs = chain(acme, 3, 3), chain(other, 3, 2)
        for part, model in ((names.slice(3, 6), acme), (theirs.slice(3, 5), other)):
            put_whole(warehouse, model, part)  # detached: nothing before them is there
        assert warehouse.lookup(acme, names) == 0
        put_whole(warehouse, other, theirs.head(3))
        assert read_all(warehouse, acme, names) == 6
        assert read_all(warehouse, other, theirs) == 5
        assert charged(warehouse) == {"acme": 6, "other": 10}


def test_a_group_is_no_tenant_of_its_own(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, _, _):
        with pytest.raises(NoSuchTenant):
            warehouse.open_model("m", tenant="public")
        names = chain(acme, 2)
        number = warehouse.tenants().shares[acme.tenant]
        with pytest.raises(NoSuchTenant):
            warehouse.begin_put(
                acme.id, names, group=0, shard=0, retention=Retention.STANDARD, owner=0,
                tenant=number,
            )  # fmt: skip


# Who is charged


def test_the_first_writer_is_charged_and_the_next_user_when_that_ones_quota_needs_room(
    scratch: Path,
) -> None:
    with group(scratch, acme={"quota_bytes": 64 * BLOCK}) as (warehouse, acme, other, _):
        public = chain(acme, 40)
        put(warehouse, acme, public)
        assert read_all(warehouse, other, public) == 40
        assert charged(warehouse) == {"acme": 40}
        put(warehouse, acme, chain(acme, 0, 24, secret=5))  # there is room still
        settle(warehouse)
        assert warehouse.lookup(acme, public) == 40
        written = warehouse.statistics()["counters"]["written_bytes"]
        assert put(warehouse, acme, chain(acme, 0, 30, secret=6)).held == 30
        settle(warehouse)
        assert charged(warehouse)["acme"] + charged(warehouse)["other"] == 94
        assert charged(warehouse)["other"] >= 30
        assert warehouse.statistics()["counters"]["evicted_blocks"] == 0
        assert warehouse.statistics()["counters"]["written_bytes"] == written + 30 * BLOCK
        assert read_all(warehouse, acme, public) == 40
        held = charged(warehouse)
    with open_warehouse(scratch) as warehouse:  # the record says it
        assert charged(warehouse) == held


def test_a_charge_passes_to_nobody_who_has_no_room_for_it(scratch: Path) -> None:
    quota = {"quota_bytes": 50 * BLOCK}
    with group(scratch, acme=quota, other=quota) as (warehouse, acme, other, _):
        public = chain(acme, 40)
        put(warehouse, acme, public)
        put(warehouse, other, chain(other, 0, 45, secret=3))
        read_all(warehouse, other, public)
        with warehouse.match(other, chain(other, 0, 45, secret=3)), warehouse.match(other, public):
            result = put(warehouse, acme, chain(acme, 0, 20, secret=4))
            settle(warehouse)
            assert result.held == 15  # 10 were free, 5 passed to other's quota
            assert charged(warehouse)["other"] == 50
            assert charged(warehouse)["acme"] >= 49  # 1/64 is kept free ahead of demand
            with pytest.raises(QuotaExceeded):
                put(warehouse, other, chain(other, 0, 1, secret=8))


def test_a_charge_passes_to_nobody_who_has_left(scratch: Path) -> None:
    with group(scratch, acme={"quota_bytes": 32 * BLOCK}) as (warehouse, acme, other, _):
        public = chain(acme, 20)
        put(warehouse, acme, public)
        read_all(warehouse, other, public)
        warehouse.operate("tenant-set", name="other", share="")
        assert put(warehouse, acme, chain(acme, 0, 30, secret=4)).held == 30
        settle(warehouse)
        assert set(charged(warehouse)) == {"acme"}
        assert warehouse.lookup(acme, public) < 20  # evicted: nobody takes it over


def test_what_is_passing_counts_against_the_quota_of_who_takes_it_over(scratch: Path) -> None:
    limits = {"acme": {"quota_bytes": 40 * BLOCK}, "other": {"quota_bytes": 40 * BLOCK}}
    with group(scratch, **limits) as (warehouse, acme, other, _):
        public, core = chain(acme, 30), warehouse._core
        put(warehouse, acme, public)
        read_all(warehouse, other, public)
        with commits_held(warehouse):  # the charges are on their way, and not there
            with core.lock:
                going, passing = sharing.let_go(core, acme.tenant, 30 * BLOCK)
            assert (passing, core.charges.used(other.tenant)) == (30 * BLOCK, 30 * BLOCK)
            assert quotas.room_bytes(core, other.tenant) == 10 * BLOCK
            with core.lock:
                assert sharing.let_go(core, acme.tenant, 30 * BLOCK)[1] == 10 * BLOCK
        for future in going:
            future.result()
        settle(warehouse)
        assert charged(warehouse) == {"other": 30}
        assert core.charges.used(other.tenant) == 30 * BLOCK


def test_a_full_tenant_evicts_no_public_block_that_another_pays_for(scratch: Path) -> None:
    with group(scratch, acme={"quota_bytes": 16 * BLOCK}) as (warehouse, acme, other, _):
        public = chain(other, 12)
        put(warehouse, other, public)
        put(warehouse, acme, chain(acme, 12, 6, secret=3))  # hangs below what other pays for
        assert charged(warehouse) == {"acme": 6, "other": 12}
        assert put(warehouse, acme, chain(acme, 0, 20, secret=4)).held == 16  # it wants more
        settle(warehouse)
        assert charged(warehouse)["other"] == 12
        assert warehouse.lookup(other, public) == 12


def test_what_the_payer_used_last_stays_with_it_until_nothing_else_is_left(scratch: Path) -> None:
    with group(scratch, acme={"quota_bytes": 32 * BLOCK}) as (warehouse, acme, other, _):
        public, private = chain(acme, 16), chain(acme, 0, 14, secret=3)
        put(warehouse, acme, public)
        put(warehouse, acme, private)
        read_all(warehouse, other, public)
        read_all(warehouse, acme, public)
        assert put(warehouse, acme, chain(acme, 0, 10, secret=4)).held == 10
        settle(warehouse)
        assert "other" not in charged(warehouse)
        assert warehouse.lookup(acme, private) < 14  # that went instead
        assert warehouse.lookup(acme, public) == 16
        with warehouse.match(acme, public), warehouse.match(other, public):
            assert put(warehouse, acme, chain(acme, 0, 30, secret=5)).held == 30
        settle(warehouse)
        assert charged(warehouse)["other"] >= 16 - 2


def test_a_session_that_is_removed_lets_go_of_what_others_used_since(scratch: Path) -> None:
    with group(scratch, layout=SHARDED) as (warehouse, acme, other, _):
        mine, theirs = chain(acme, 4, 2), chain(other, 4, 1)
        put_whole(warehouse, acme, mine)
        put_whole(warehouse, other, theirs)
        read_all(warehouse, other, theirs)
        assert charged(warehouse) == {"acme": 12, "other": 2}
        warehouse.remove(acme.id, mine.hash_at(5))
        settle(warehouse)
        assert charged(warehouse) == {"other": 10}
        assert read_all(warehouse, other, theirs) == 5
        warehouse.remove(other.id, theirs.hash_at(4))
        assert charged(warehouse) == {}


def test_who_leaves_a_group_lets_go_of_all_and_unpaid_blocks_find_their_next_user(
    scratch: Path,
) -> None:
    with group(scratch) as (warehouse, acme, other, _):
        used, unused = chain(acme, 5), chain(acme, 3, seed=7)
        put(warehouse, acme, used)
        put(warehouse, acme, unused)
        put(warehouse, acme, chain(acme, 0, 2, secret=3))
        read_all(warehouse, other, used)
        begun = warehouse.begin_put(
            acme.id, chain(acme, 1, seed=9), group=0, shard=0, retention=Retention.STANDARD,
            owner=0, tenant=acme.tenant,
        )  # fmt: skip
        with pytest.raises(NotEmpty, match="under way"):
            warehouse.operate("tenant-set", name="acme", share="")
        begun.abandon()
        warehouse.operate("tenant-set", name="acme", share="elsewhere")
        assert charged(warehouse) == {"acme": 2, "other": 5, "public": 3}
        assert warehouse.lookup(acme, used) == 0
        assert warehouse.open_model("m", tenant="acme").public_salt != acme.public_salt
        assert read_all(warehouse, other, unused) == 3
        evicting.keep_quotas(warehouse._core)  # as the tender does every second
        settle(warehouse)
        assert charged(warehouse) == {"acme": 2, "other": 8}


def test_a_member_is_removed_though_the_group_keeps_its_blocks(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, other, _):
        names = chain(acme, 4, 1)
        put(warehouse, acme, names)
        read_all(warehouse, other, names.head(4))
        with pytest.raises(NotEmpty, match="1 blocks"):
            warehouse.operate("tenant-remove", name="acme")
        assert charged(warehouse) == {"acme": 5}
        warehouse.evict(BLOCK)  # type: ignore[arg-type]
        warehouse.operate("tenant-remove", name="acme")
        assert charged(warehouse) == {"other": 4}


def test_charges_survive_a_lost_metadata_as_they_were_at_publish(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, other, _):
        names = chain(acme, 4, 2)
        put(warehouse, acme, names)
        put(warehouse, other, chain(other, 3, 1, seed=8))
        read_all(warehouse, other, names.head(4))
        warehouse.operate("tenant-set", name="acme", share="")
        assert charged(warehouse) == {"acme": 2, "other": 8}
        assert block_at(warehouse, other, names, 0)[1].payer == other.tenant
    shutil.rmtree(scratch / "meta")
    rebuild(scratch)
    with open_warehouse(scratch) as warehouse:  # acme has left: nobody pays for what it wrote
        assert charged(warehouse) == {"acme": 2, "other": 4, "public": 4}
        again = warehouse.open_model("m", tenant="other")
        assert again.public_salt == other.public_salt
        assert read_all(warehouse, again, names.head(4)) == 4


def test_who_has_left_and_come_back_finds_its_private_blocks_again(scratch: Path) -> None:
    with group(scratch) as (warehouse, acme, _, _):
        names = chain(acme, 3, 2)
        put(warehouse, acme, names)
        warehouse.operate("tenant-set", name="acme", share="")
        assert warehouse.lookup(acme, names) == 0
        warehouse.operate("tenant-set", name="acme", share="public")
        assert read_all(warehouse, acme, names) == 5
        for key, block in records_of(warehouse._core).items():
            assert block.tenant in {acme.tenant, warehouse.tenants().shares[acme.tenant]}, key


# Through the daemon


@pytest.mark.root
def test_the_daemon_hands_a_groups_salt_to_its_members_and_shows_its_sessions_to_them(
    scratch: Path,
) -> None:
    with running_daemon(scratch / "w") as daemon, daemon.client() as root:
        for path in (scratch, scratch / "w"):
            path.chmod(0o711)
        daemon.socket.chmod(0o666)
        for name, uid, share in (("acme", ACME, "public"), ("other", OTHER, "public"),
                                 ("third", THIRD, None)):  # fmt: skip
            root.operate("tenant-add", name=name, owner=uid, uids=[uid], share=share)
        clients = [client_of(daemon, uid) for uid in (ACME, OTHER, THIRD)]
        acme, other, third = clients
        models = [
            client.open_model("m", MHA, tenant=name)
            for client, name in zip(clients, ("acme", "other", "third"), strict=True)
        ]
        assert models[0].public_salt == models[1].public_salt != b""
        assert models[2].public_salt == b""
        names, theirs = chain(models[0], 3, 2), chain(models[1], 3, 1)
        assert acme.put(models[0], names, payloads_of(MHA, names)).held == 5
        assert other.lookup(models[1], theirs) == 3
        result = other.put(models[1], theirs, payloads_of(MHA, theirs))
        assert (result.held, result.outcomes.count(PutOutcome.PUBLISHED)) == (4, 1)
        assert third.lookup(models[2], names) == 0
        stolen = replace(models[2], tenant=models[0].tenant)
        assert third.lookup(stolen, names) == 0
        group_number = root.tenants().shares[models[0].tenant]
        assert other.lookup(replace(models[1], tenant=group_number), names) == 0
        only_public = chain(models[0], 2, seed=4)
        assert acme.put(models[0], only_public, payloads_of(MHA, only_public)).held == 2
        head, private = only_public.hash_at(1), names.hash_at(4)
        assert set(acme.heads(models[0].id)) == {head, private}
        assert set(other.heads(models[0].id)) == {head, theirs.hash_at(3)}
        assert third.heads(models[0].id) == []
        for forbidden in (
            lambda: other.chain_of(models[0].id, private),
            lambda: third.chain_of(models[0].id, head),
            lambda: third.chain_of(models[0].id, names.hash_at(0)),
            lambda: third.remove(models[0].id, head),
            lambda: other.remove(models[0].id, private),
        ):
            with pytest.raises(NoSuchBlock):
                forbidden()
        with pytest.raises(NotAllowed, match="one by one"):
            other.remove(models[0].id, names.hash_at(0), below=True)
        assert len(other.chain_of(models[0].id, theirs.hash_at(3))) == 4
        assert other.remove(models[0].id, head) == 2 * BLOCK
        newer = acme.new_epoch(models[0])
        assert newer.public_salt == models[0].public_salt
        for client in clients:
            client.close()
