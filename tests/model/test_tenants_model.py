"""Tenants with quotas and a share group against a perfect account of who holds and pays for what.

Any order of puts, matches, removals, changes of quotas and groups, and restarts: each block is
charged once, to who wrote it or to who used it when that one let go; no quota is ever passed; a put
costs no other tenant a block; the checker and `du` agree.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.warehouses import (
    BLOCK_TOKENS,
    MHA,
    assert_memory_agrees,
    make_warehouse,
    records_of,
    settle,
    stop_tending,
    tokens_of,
)
from support.warehouses import put as put_names
from twfs.admin import usage
from twfs.admin.usage import By
from twfs.errors import NotEmpty, QuotaExceeded
from twfs.eviction import evicting
from twfs.prefix import Names
from twfs.records import BlockKey
from twfs.store import Model, PutOutcome, iterate_heads
from twfs.units import ByteCount
from twfs.warehouse import Warehouse

BLOCK = 8192  # on the device
TENANTS = ("acme", "other", "third", "free")  # the first three may be in the group, with quotas
GROUP = "public"

who = st.sampled_from(TENANTS)
member = st.sampled_from(TENANTS[:3])


@dataclass(slots=True)
class Charge:
    """What the account says of one block."""

    owner: str  # a tenant, or the group
    payer: str  # a tenant, or the group: nobody
    other: str = ""  # of the group's: the last other user
    lent: bool = False  # and that one's use was later than the payer's


class TenantsMachine(RuleBasedStateMachine):
    """Drives a warehouse, and keeps the account beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="twfs-tenants-"))
        make_warehouse(self.directory)
        self.account: dict[BlockKey, Charge] = {}
        self.quota = dict.fromkeys(TENANTS[:3], 24)
        self.shares = {"acme", "other"}
        self.let_go: set[str] = set()  # who may have let go of what it pays for, in this step
        self.puts_by = ""  # for whom blocks may have been evicted in this step
        self.warehouse = self.open()

    def open(self) -> Warehouse:
        warehouse = Warehouse.open(self.directory)
        stop_tending(warehouse)
        return warehouse

    @initialize()
    def make_tenants(self) -> None:
        for name in TENANTS:
            share = {"share": GROUP} if name in self.shares else {}
            quota = {"quota_bytes": 24 * BLOCK} if name in self.quota else {}
            self.warehouse.operate("tenant-add", name=name, owner=0, uids=[], **share, **quota)

    def model(self, name: str) -> Model:
        return self.warehouse.open_model("m", MHA, tenant=name)

    def name_of(self, number: int) -> str:
        return self.warehouse.tenants().name_of(number)

    def names(self, name: str, public: int, private: int, seed: int) -> Names:
        """A chain of *name*: public blocks if it is in the group, then its own."""
        model, public = self.model(name), public if name in self.shares else 0
        chain = model.chain(public_tokens=public * BLOCK_TOKENS)
        return chain.extend(tokens_of(public)).extend(tokens_of(max(1, private), seed)).names()

    def use(self, name: str, names: Names, count: int) -> None:
        """Note that *name* used the first *count* blocks."""
        model = self.model(name).id
        for index in range(count):
            charge = self.account.get(BlockKey(model, names.hash_at(index), 0, 0))
            if charge is not None and charge.owner == GROUP:
                charge.lent = charge.payer != name
                if charge.lent:
                    charge.other = name

    def follow(self) -> None:
        """Compare the account with the records after a step, and let it follow what is allowed."""
        settle(self.warehouse)
        settle(self.warehouse)
        records = records_of(self.warehouse._core)
        for key, charge in list(self.account.items()):
            block = records.get(key)
            if block is None:
                assert charge.payer == self.puts_by or not self.puts_by, (key, charge)
                del self.account[key]
                continue
            assert self.name_of(block.tenant) == charge.owner
            payer = self.name_of(block.charged)
            if payer != charge.payer:
                assert charge.owner == GROUP
                assert charge.payer in self.let_go
                assert payer == charge.other or (payer == GROUP and charge.payer not in self.shares)
                self.account[key] = Charge(GROUP, payer)
        assert set(records) == set(self.account)
        self.let_go, self.puts_by = set(), ""

    @rule(name=who, public=st.integers(0, 8), private=st.integers(0, 12), seed=st.integers(1, 4))
    def put(self, name: str, public: int, private: int, seed: int) -> None:
        names = self.names(name, public, private, seed)
        self.puts_by, model = name, self.model(name)
        self.let_go = {name, GROUP}
        try:
            outcomes = put_names(self.warehouse, model, names).outcomes
        except QuotaExceeded:
            assert name in self.quota
            outcomes = ()
        for index, outcome in enumerate(outcomes):
            if outcome is PutOutcome.PUBLISHED:
                owner = GROUP if index < names.public else name
                self.account[BlockKey(model.id, names.hash_at(index), 0, 0)] = Charge(owner, name)
            else:
                assert outcome in {PutOutcome.PRESENT, PutOutcome.OVER_QUOTA}
                assert outcome is PutOutcome.PRESENT or name in self.quota
        # What a small put of a tenant without leases lacks is there afterwards, if it fits at all.
        if len(names) <= self.quota.get(name, 1 << 20) - 1 and outcomes:
            assert PutOutcome.OVER_QUOTA not in outcomes[:1]
        self.follow()

    @rule(name=who, public=st.integers(0, 8), private=st.integers(0, 12), seed=st.integers(1, 4))
    def match(self, name: str, public: int, private: int, seed: int) -> None:
        names = self.names(name, public, private, seed)
        with self.warehouse.match(self.model(name), names) as match:
            held = match.blocks
        model = self.model(name).id
        reached = 0
        for index in range(len(names)):
            charge = self.account.get(BlockKey(model, names.hash_at(index), 0, 0))
            if charge is None or charge.owner not in {name, *([GROUP] * (name in self.shares))}:
                break
            reached += 1
        assert held == reached
        self.use(name, names, held)

    @rule(name=who, number=st.integers(0, 9))
    def remove(self, name: str, number: int) -> None:
        model = self.model(name)
        heads = [
            head
            for head in iterate_heads(self.warehouse, model.id)
            if self.account[BlockKey(model.id, head, 0, 0)].payer == name
        ]
        if heads:
            self.warehouse.remove(model.id, heads[number % len(heads)])
            self.let_go = {name}
            self.follow()

    @rule(name=member, blocks=st.integers(6, 40))
    def set_quota(self, name: str, blocks: int) -> None:
        self.quota[name] = blocks
        self.puts_by, self.let_go = name, {name}
        self.warehouse.operate("tenant-set", name=name, quota_bytes=blocks * BLOCK)
        self.follow()

    @rule(name=member)
    def change_group(self, name: str) -> None:
        if name in self.shares:
            self.shares.remove(name)
            self.warehouse.operate("tenant-set", name=name, share="")
        else:
            self.shares.add(name)
            self.warehouse.operate("tenant-set", name=name, share=GROUP)
        self.let_go = {name}
        self.puts_by = name
        self.follow()

    @rule()
    def tend(self) -> None:
        self.let_go = {GROUP}
        evicting.keep_quotas(self.warehouse._core)
        settle(self.warehouse)
        self.let_go |= set(self.quota)
        self.follow()

    @rule(blocks=st.integers(1, 5))
    def evict(self, blocks: int) -> None:
        self.warehouse.evict(ByteCount(blocks * BLOCK))
        self.follow()

    @rule()
    def reopen(self) -> None:
        self.warehouse.close()
        self.warehouse = self.open()
        for charge in self.account.values():  # uses by others are in memory alone
            charge.other, charge.lent = "", False
        self.follow()

    @invariant()
    def everybody_pays_for_its_blocks_and_no_more(self) -> None:
        core = self.warehouse._core
        held = dict.fromkeys((*TENANTS, GROUP), 0)
        for charge in self.account.values():
            held[charge.payer] += BLOCK
        assert {self.name_of(n): b for n, b in core.charges.held.items() if b} == {
            name: byte_count for name, byte_count in held.items() if byte_count
        }
        for name, blocks in self.quota.items():
            assert held[name] <= blocks * BLOCK
        rows = {row.name: row for row in usage.usage(core, By.TENANT).rows}
        for name, row in rows.items():
            own = [c for c in self.account.values() if c.payer == name]
            assert row.exclusive_bytes == sum(BLOCK for c in own if c.owner == name)
            assert row.shared_bytes == sum(BLOCK for c in own if c.owner != name)

    @invariant()
    def all_is_sound(self) -> None:
        assert self.warehouse.check().findings == ()
        assert_memory_agrees(self.warehouse._core)
        for by in By:
            assert usage.usage(self.warehouse._core, by).adds_up

    def teardown(self) -> None:
        self.warehouse.close()
        shutil.rmtree(self.directory)


TenantsMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25)
TestTenants = TenantsMachine.TestCase


def test_a_tenant_whose_put_is_under_way_does_not_leave(scratch: Path) -> None:
    """As the machine drives one thread, this is beside it."""
    make_warehouse(scratch)
    with Warehouse.open(scratch) as warehouse:
        warehouse.operate("tenant-add", name="acme", owner=0, uids=[], share=GROUP)
        core = warehouse._core
        core.puts_of[2] += 1
        try:
            warehouse.operate("tenant-set", name="acme", share="")
        except NotEmpty:
            assert core.tenants.shares == {2: 1}
        else:
            raise AssertionError("it left")
        core.puts_of[2] -= 1
