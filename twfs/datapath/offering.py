"""The beginning of a put: it is looked at, compared with what is there, let in, and reserved."""

from collections.abc import Sequence

from twfs.core.state import Core
from twfs.datapath.putting import PUT_BLOCKS_MAX, Put
from twfs.datapath.runs import check_lengths
from twfs.errors import InvalidInput, NoSuchTenant, TooLarge
from twfs.eviction import retaining
from twfs.hints import NO_HINT, Hint, Retention
from twfs.prefix import Names, check_names
from twfs.tenants import EVERYBODY
from twfs.units import ModelId


def begin_put(
    core: Core, model: ModelId, names: Names, *, group: int, shard: int, retention: Retention,
    tenant: int = EVERYBODY, uid: int | None = None, lengths: Sequence[int] = (),
    hint: Hint = NO_HINT, beside_share: bool = False,
) -> Put:  # fmt: skip
    """Compare *names* with what is there, and reserve room for the rest; may evict and wait.

    The blocks will belong to *tenant*; with *uid* the bound on one user's reservations holds.
    *lengths* has the payload bytes of each where the layout allows any. What is pinned
    *beside_share* has a bound of its own: it is not refused because others have pinned much.
    StaleEpoch, NoSuchModel, NoSuchTenant, InvalidInput, TooLarge, WarehouseFull, QuotaExceeded,
    PromiseRefused.
    """
    if len(names) > PUT_BLOCKS_MAX:
        raise TooLarge(f"a put of {len(names)} blocks; at most {PUT_BLOCKS_MAX} go at once")
    check_names(names)
    retaining.change_asked(core, model, tenant, hint)
    hashes = {names.hash_at(index) for index in range(len(names))}
    if len(hashes) != len(names):
        raise InvalidInput(f"{len(names) - len(hashes)} names stand twice in one put")
    with core.lock:
        record = core.model(model)
        layout = record.layout
        if not 0 <= group < len(layout.groups) or not 0 <= shard < layout.shards:
            raise InvalidInput(
                f"group {group}, shard {shard} of model {record.name}: it has "
                f"{len(layout.groups)} groups and {layout.shards} shards"
            )
        check_lengths(layout, group, lengths, len(names))
        if not core.tenants.pays(tenant):
            raise NoSuchTenant(f"tenant {tenant} has been removed: open the model for another")
        if names.public and tenant not in core.tenants.shares:
            raise InvalidInput(
                f"tenant {core.tenants.name_of(tenant)} is in no share group: none of its blocks "
                "are public"
            )
        put = Put(
            core, record, names, group=group, shard=shard, retention=hint.retention or retention,
            tenant=tenant, uid=uid, lengths=lengths, hint=hint,
        )  # fmt: skip
        lacking = put.compare()
        core.puts_of[tenant] += 1  # until it ends: a tenant with puts is not removed
    try:
        with core.lock:
            lacking = put.admit(lacking)
            if not beside_share:
                lacking = put.promise(lacking)
        put.reserve(lacking)
    except BaseException:
        put.abandon()
        raise
    return put
