"""Promises to pin: what may be pinned is reserved before it is done, or refused to who asks.

Of what asks for it the bytes are counted that its sessions would pin and nothing pins yet. A chain
whose beginning is missing is not pinned: it would pin what comes before it later, promised or not.
Hold the lock for all of it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from twfs.core.state import Core
from twfs.errors import PromiseRefused
from twfs.index import slots as states
from twfs.index.siblings import is_alone, others
from twfs.index.slots import NONE
from twfs.layout import GroupKind
from twfs.metadata.ledger import begins_chain
from twfs.metadata.sessions import SessionKey, Touch, find
from twfs.metadata.tables import ModelRecord, ReadView
from twfs.policy.retention import PINNED, held_bytes
from twfs.prefix import Names
from twfs.records import BlockKey
from twfs.units import ALIGN, ByteCount, PrefixHash

LOOSE: Final = "the beginning of its chain is missing: put that first, then pin"


@dataclass(frozen=True, slots=True)
class Brought:
    """What a put that is to be pinned brings."""

    model: ModelRecord
    group: int
    shard: int
    names: Names
    lacking: Sequence[int]  # indices of what is not there
    needs: Sequence[ByteCount]  # bytes on the devices of these
    beside: Sequence[int]  # slots of what is there: to be pinned too

    def key(self, prefix_hash: PrefixHash) -> BlockKey:
        """The key of a block of the same group and shard."""
        return BlockKey(self.model.id, prefix_hash, self.group, self.shard)


def room_bytes(core: Core) -> int:
    """Bytes that may be pinned more."""
    limit = int(core.terms.shares[PINNED] * core.allocator.total_bytes)
    return limit - held_bytes(core.slots, PINNED) - core.promised_bytes


def _promise(core: Core, need_bytes: int) -> None:
    """Reserve so much of what may be pinned; PromiseRefused."""
    room = room_bytes(core)
    if need_bytes > max(0, room):  # what takes nothing more is never refused
        core.promises.refused += 1
        limit = int(core.terms.shares[PINNED] * core.allocator.total_bytes)
        raise PromiseRefused(
            f"{need_bytes} bytes cannot be pinned: {max(0, room)} of {limit} are left for it; "
            "unpin some sessions, or raise the share in [retention.pinned] of twfs.toml"
        )
    core.promised_bytes += need_bytes


def promise_ends(core: Core, view: ReadView, ends: Sequence[int]) -> tuple[set[int], int]:
    """Promise to pin what sessions are over that end at the slots *ends*; PromiseRefused.

    Returns the slots that this pins, and the bytes reserved.
    """
    if core.slots.detached[list(ends)].any():
        core.promises.refused += 1
        raise PromiseRefused(f"a session cannot be pinned: {LOOSE}")
    fresh = _unpinned(core, view, ends)
    promised = _bytes_in(core, fresh)
    _promise(core, promised)
    return fresh, promised


def promise_put(core: Core, brought: Brought) -> tuple[int, int]:
    """Promise a put that is to be pinned what it can be: how many blocks, and the bytes reserved.

    PromiseRefused if not even the first fits, or where the beginning of a chain is missing.
    """
    with core.metadata.read() as view:
        if _is_loose(core, view, brought):
            core.promises.refused += 1
            raise PromiseRefused(f"a put cannot be pinned: {LOOSE}")
        ends = [*brought.beside, *_waiting_below(core, view, brought)]
        fresh = _bytes_in(core, _unpinned(core, view, ends))
    fit = int(np.searchsorted(np.cumsum(brought.needs), room_bytes(core) - fresh, "right"))
    promised = fresh + int(sum(brought.needs[: max(1, fit)]))
    _promise(core, promised)
    return fit, promised


def promise_moves(core: Core, asked: dict[SessionKey, Touch]) -> tuple[Collection[SessionKey], int]:
    """Promise to pin what pinned sessions are over where touches let them end.

    Returns those that have to stay where they are, since that is more than may be pinned, and the
    bytes reserved.
    """
    stay, promised = set(), 0
    with core.metadata.read() as view:
        for key, touch in asked.items():
            model, session = core.models.get(key.model), find(view, key)
            if model is None or session is None or session.retention < PINNED:
                continue
            standing = BlockKey(key.model, touch.asked.reach[-1], model.layout.spine, 0)
            block = view.block(standing)
            if block is None or core.slots.state[block.slot] != states.LIVE:
                continue
            try:
                promised += promise_ends(core, view, [int(block.slot)])[1]
            except PromiseRefused:  # one-way: who touched has gone on; it is counted
                stay.add(key)
    return stay, promised


def _unpinned(core: Core, view: ReadView, ends: Iterable[int]) -> set[int]:
    """Slots of the blocks that would be pinned by sessions ending at the slots *ends*."""
    slots = core.slots
    found: set[int] = set()
    for end in ends:
        at = end
        while at != NONE and at not in found and slots.retention[at] != PINNED:
            found.add(at)
            at = int(slots.parent[at])
    beside: set[int] = set()
    for slot in found:
        key = slots.key_of(slot)
        model = core.models.get(key.model)
        if model is not None and not is_alone(model):
            standing = BlockKey(key.model, key.prefix_hash, model.layout.spine, 0)
            beside.update(
                s for s in others(view, slots, model, standing) if slots.retention[s] != PINNED
            )
    return found | beside


def _bytes_in(core: Core, slots: Iterable[int]) -> int:
    """Bytes on the devices of the blocks in *slots*."""
    return int(core.slots.units[np.fromiter(slots, np.int64)].sum()) * ALIGN


def _is_loose(core: Core, view: ReadView, brought: Brought) -> bool:
    """Tell whether a chain of the put begins behind a block that is not there, or is detached."""
    names, layout = brought.names, brought.model.layout
    if layout.groups[brought.group].kind is not GroupKind.FULL:
        return False
    named = {names.hash_at(index) for index in range(len(names))}
    for index in range(len(names)):
        parent = names.parent_at(index)
        own_key = names.keys[index] if names.keys else b""
        if parent in named or begins_chain(parent, own_key, names.positions[index], layout):
            continue
        block = view.block(brought.key(parent))
        if (
            block is None
            or core.slots.state[block.slot] != states.LIVE
            or core.slots.detached[block.slot]
        ):
            return True
    return False


def _waiting_below(core: Core, view: ReadView, brought: Brought) -> set[int]:
    """Slots of the blocks that hang below what the put lacks, and join their chain with it."""
    found: set[int] = set()
    waiting = [brought.key(brought.names.hash_at(index)) for index in brought.lacking]
    while waiting:
        for child in view.children(waiting.pop()):
            key = brought.key(child)
            block = view.block(key)
            if block is not None and block.slot not in found and core.slots.detached[block.slot]:
                found.add(int(block.slot))
                waiting.append(key)
    return found
