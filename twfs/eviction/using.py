"""What a use of blocks tells the score: how the request ended, and which session went on.

Sessions are told apart by (model, tenant, engine's id, first block), so that an agent's helpers,
which begin with another prompt, are sessions of their own. Without an id, a chain that goes on
where one other ended, or leaves it, is the same session; where several part, a new one begins.
"""

from twfs.core.state import Core
from twfs.hints import Hint
from twfs.index import slots as states
from twfs.index.slots import IntArray
from twfs.metadata.ledger import Published
from twfs.policy.accesses import Kind
from twfs.units import ModelId, PrefixHash


def note_touch(
    core: Core, model: ModelId, first: PrefixHash, used: IntArray, hint: Hint, *, tenant: int
) -> None:
    """A request that used the blocks in the slots *used*, from *first* on, has ended.

    The last of *used* is the deepest. Hold the lock.
    """
    slots = core.slots
    used_ms = int(slots.stamp[used].min())  # none of them must seem to be of an earlier request
    slots.stop[used] = 0 if hint.stop is None else hint.stop.code
    slots.back_ms[used] = 0 if hint.return_ms is None else used_ms + hint.return_ms
    if hint.session:
        number = slots.uses.number_of((model, tenant, hint.session, first))
        slots.session[used] = number
    else:
        number = int(slots.session[used[-1]])
    slots.uses.heard(number, used_ms)


def note_put(core: Core, model: ModelId, tenant: int, done: Published, hint: Hint) -> None:
    """Blocks have been published, and are in the arrays already. Hold the lock.

    Their session was last heard of when it used what it went on from: at its match, or just now.
    """
    if not done.entered:
        return
    slots = core.slots
    new = [int(entered.block.slot) for entered in done.entered]
    parent = done.entered[0].parent_slot
    if hint.session:
        first = slots.key_of(slots.ancestors(new[0])[-1]).prefix_hash
        number = slots.uses.number_of((model, tenant, hint.session, first))
    else:
        number = _session_without_id(core, parent)
    slots.session[new] = number
    slots.stop[new] = 0 if hint.stop is None else hint.stop.code
    if hint.return_ms is not None:
        slots.back_ms[new] = core.clock() + hint.return_ms
    slots.uses.heard(number, int(slots.stamp[new[0] if parent is None else parent]))
    record, begun = core.models.get(model), done.entered[0].block
    if record is not None:
        core.recorder.note(
            Kind.PUT, model, record.layout,
            b"".join([each.key.prefix_hash for each in done.entered]), tenant=tenant,
            retention=begun.retention, stop=0 if hint.stop is None else hint.stop.code,
            start=max(0, begun.position // record.layout.block_tokens - 1),
        )  # fmt: skip


def _session_without_id(core: Core, parent: int | None) -> int:
    """The session of a chain that has just gone on below *parent*, or begun."""
    slots = core.slots
    if parent is None or parent == states.NONE:
        return slots.uses.new()
    alone = slots.children[parent] == 1  # its only child is the new one
    left = slots.links[parent] == 2  # one other chain goes through it, as it did before
    number = int(slots.session[parent]) if alone or left else 0
    return number or slots.uses.new()
