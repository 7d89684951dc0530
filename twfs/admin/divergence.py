"""Where chains part that could have been one, from hashes alone: `twfs advise --prompts`.

A time, a request's number or a user's name near the beginning of a prompt makes all that follows
different for every request, and so stored once each. What a store can see of it: very many blocks
below one parent, each with a chain of its own behind it that nothing else shares. What it cannot
see is whether the texts behind are alike. At most as many tokens as the shortest of the chains
could be common to all, so that is what is counted, but for the shortest tenth of them.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from twfs.core.state import Core
from twfs.index import slots as states
from twfs.index.slots import KEY_BYTES, IntArray
from twfs.units import ALIGN, ModelId

FAN_OUT_MIN: Final = 4  # fewer chains part wherever a conversation is taken up twice
SHORTEST_PART: Final = 0.1  # of the chains: they may be shorter than what is counted as common
COPIED: Final = ("key", "parent", "links", "units", "tenant", "state", "detached")
HASH_AT: Final = slice(4, 20)  # of a packed key


@dataclass(frozen=True, slots=True)
class Parting:
    """Chains of one tenant and model that part behind `position` tokens."""

    model: str
    tenant: str
    after: str  # prefix hash of the block behind which they part; empty: at the very beginning
    position: int  # tokens that all of them share
    until: int  # the first that differs stands before this
    fan_out: int  # chains that go on, each for one session
    shared: int  # others there, that several sessions share
    common_tokens: int  # behind: nine of ten chains have so many, so they may be alike so far
    median_tokens: int
    behind_tokens: int  # all that lies behind, stored once each
    lost_tokens: int  # of it, what one copy would spare if all are alike so far
    lost_bytes: int


@dataclass
class _Forest:
    """The blocks that stand for their names, n of them, and the tree they form."""

    slot: IntArray
    parent: IntArray  # into these; -1 for the first of a chain
    depth: IntArray  # 0 for the first
    model: IntArray
    tenant: IntArray
    links: IntArray
    hash: IntArray  # (n, 16)
    height: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # blocks below, longest
    below: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # blocks below, all


def partings(core: Core, limit: int = 20) -> list[Parting]:
    """Where most is lost, the worst first; a second or two for a million blocks.

    The arrays are copied under the lock, and looked at outside it.
    """
    with core.lock:
        count = len(core.slots)
        arrays = {name: getattr(core.slots, name)[:count].copy() for name in COPIED}
        models = dict(core.models)
        names = {int(n): core.tenants.name_of(int(n)) for n in np.unique(arrays["tenant"])}
    sizes = _bytes_of_names(arrays)
    forest = _forest(arrays, {number: record.layout.spine for number, record in models.items()})
    if not len(forest.slot):
        return []
    _measure(forest)
    found = []
    for model, tenant, parent, alone, shared in _fans(forest):
        record = models.get(ModelId(model))
        if record is None:
            continue
        tokens, lengths = record.layout.block_tokens, np.sort(forest.height[alone])
        common = int(lengths[int(SHORTEST_PART * len(lengths))])
        lost = (len(alone) - 1) * common
        position = 0 if parent < 0 else (int(forest.depth[parent]) + 1) * tokens
        found.append(Parting(
            record.name, names[tenant],
            "" if parent < 0 else forest.hash[parent].tobytes().hex(),
            position, position + tokens, len(alone), shared, common * tokens,
            int(lengths[len(lengths) // 2]) * tokens, int(forest.below[alone].sum()) * tokens,
            lost * tokens, int(lost * sizes.get(model, 0)),
        ))  # fmt: skip
    found.sort(key=lambda each: (-each.lost_bytes, -each.lost_tokens, each.after))
    return found[:limit]


def _models(key: IntArray) -> IntArray:
    raw = key.view(np.uint8).reshape(len(key), KEY_BYTES)
    return np.ascontiguousarray(raw[:, :4]).view(">u4").ravel().astype(np.int64)


def _bytes_of_names(arrays: dict[str, IntArray]) -> dict[int, float]:
    """Bytes that one name of each model takes, all groups and shards of it."""
    live = arrays["state"] == states.LIVE
    model = _models(arrays["key"])[live]
    raw = arrays["key"].view(np.uint8).reshape(len(live), KEY_BYTES)[live]
    found = {}
    for number in np.unique(model).tolist():
        mine = model == number
        parts = len(np.unique(raw[mine][:, 20:23], axis=0))
        units = arrays["units"][live][mine].astype(np.int64)
        found[number] = float(units.mean()) * ALIGN * parts
    return found


def _forest(arrays: dict[str, IntArray], spines: dict[ModelId, int]) -> _Forest:
    """The live blocks of every model's first full group and first shard."""
    count = len(arrays["state"])
    raw = arrays["key"].view(np.uint8).reshape(count, KEY_BYTES)
    model = _models(arrays["key"])
    spine = np.zeros(count, np.uint8)
    for number, group in spines.items():
        spine[model == number] = group
    stands = (arrays["state"] == states.LIVE) & (raw[:, 20] == spine)
    stands &= (raw[:, 21] == 0) & (raw[:, 22] == 0)
    slot = np.flatnonzero(stands)
    index = np.full(count + 1, -1, np.int64)
    index[slot] = np.arange(len(slot))
    up = arrays["parent"][slot].astype(np.int64)
    parent = index[np.where(up == states.NONE, count, up)]
    depth, lost = _depths(parent, arrays["detached"][slot] | ((up != states.NONE) & (parent < 0)))
    depth[lost] = -1  # below what is not there: nobody knows where in a prompt that is
    return _Forest(
        slot, parent, depth, model[slot], arrays["tenant"][slot].astype(np.int64),
        arrays["links"][slot].astype(np.int64), raw[slot][:, HASH_AT],
    )  # fmt: skip


def _depths(parent: IntArray, lost: IntArray) -> tuple[IntArray, IntArray]:
    """Blocks above each block, and whether a *lost* one is among it and them.

    The height looked at doubles with each round, so there are as many as the depth has bits.
    """
    count = len(parent)
    up = np.append(np.where(parent < 0, count, parent), count)
    depth = np.append((parent >= 0).astype(np.int64), 0)
    bad = np.append(lost, False)
    while (up != count).any():
        depth = depth + depth[up]
        bad = bad | bad[up]
        up = up[up]
    return depth[:count], bad[:count]


def _measure(forest: _Forest) -> None:
    """Sum up what lies below every block, and how deep, itself included: from the tails up."""
    count = len(forest.slot)
    forest.height = np.ones(count, np.int64)
    forest.below = np.ones(count, np.int64)
    order = np.argsort(forest.depth, kind="stable")[::-1]
    depths = forest.depth[order]
    ends = np.flatnonzero(np.append(depths[1:] != depths[:-1], True)) + 1
    first = 0
    for end in ends.tolist():
        level = order[first:end]
        first = end
        level = level[forest.parent[level] >= 0]
        parents = forest.parent[level]
        np.maximum.at(forest.height, parents, forest.height[level] + 1)
        np.add.at(forest.below, parents, forest.below[level])


def _fans(forest: _Forest) -> Any:
    """Each (model, tenant, parent, children for one session alone, number of other children)."""
    here = np.flatnonzero(forest.depth >= 0)
    order = here[np.lexsort((forest.parent[here], forest.tenant[here], forest.model[here]))]
    keys = np.stack([forest.model[order], forest.tenant[order], forest.parent[order]])
    changes = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
    starts = np.concatenate([[0], changes])
    ends = np.concatenate([changes, [len(order)]])
    many = ends - starts >= FAN_OUT_MIN
    for start, end in zip(starts[many].tolist(), ends[many].tolist(), strict=True):
        children = order[start:end]
        alone = children[forest.links[children] <= 1]
        if len(alone) >= FAN_OUT_MIN:
            model, tenant, parent = keys[:, start].tolist()
            yield model, tenant, parent, alone, len(children) - len(alone)


def sentence(found: Parting) -> str:
    """What it means for who writes the prompts."""
    where = (
        f"{found.fan_out:,} prompts of {found.model} have nothing in common from their first "
        f"{found.until:,} tokens on"
        if not found.position
        else f"{found.fan_out:,} prompts of {found.model} are alike for {found.position:,} tokens "
        f"and differ before token {found.until:,}"
    )
    return (
        f"{where}; nine in ten go on for {found.common_tokens:,} tokens or more, stored once each. "
        "If that is a time, a number or a name, put it behind what all prompts share: up to "
        f"{found.lost_tokens:,} tokens fewer."
    )
