"""The class of a prefix hash is that of all its blocks, in whatever group and shard they are.

Sessions end at the block that stands for a prefix hash; the others follow it here, in memory.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from twfs.index.slots import CONDEMNED, LIVE, NOBODY, IntArray, Slots
from twfs.metadata.tables import ModelRecord, ReadView
from twfs.records import BLOCK_DTYPE, BlockKey
from twfs.units import ModelId

SLOT_OFFSET = int(BLOCK_DTYPE.fields["slot"][1])  # type: ignore[index]


def slot_of(view: ReadView, key: BlockKey) -> int | None:
    """The slot of one block, without unpacking the rest of its record."""
    raw = view.raw_block(key.pack())
    return None if raw is None else int.from_bytes(raw[SLOT_OFFSET : SLOT_OFFSET + 4], "little")


def entered_slot(view: ReadView, slots: Slots, key: BlockKey) -> int | None:
    """The slot of one block that has entered memory.

    *view* may be ahead: one transaction publishes for many, and memory follows one by one.
    """
    slot = slot_of(view, key)
    return slot if slot is not None and slots.state[slot] in (LIVE, CONDEMNED) else None


def others(view: ReadView, slots: Slots, model: ModelRecord, standing: BlockKey) -> list[int]:
    """Slots of all blocks of the prefix hash of *standing* in memory, but for that one."""
    found = []
    for group in range(len(model.layout.groups)):
        for shard in range(model.layout.shards):
            if (group, shard) != (standing.group, standing.shard):
                key = BlockKey(standing.model, standing.prefix_hash, group, shard)
                slot = entered_slot(view, slots, key)
                if slot is not None:
                    found.append(slot)
    return found


def is_alone(model: ModelRecord) -> bool:
    """Whether a prefix hash of *model* has one block and no more."""
    return len(model.layout.groups) * model.layout.shards == 1


def share_classes(
    view: ReadView, slots: Slots, models: Mapping[ModelId, ModelRecord], changed: Iterable[int],
    *, entered: Iterable[BlockKey], gone: Iterable[BlockKey],
) -> None:  # fmt: skip
    """Give the class of the standing blocks in *changed* to their siblings, and *entered* theirs.

    *changed* are slots of blocks that stand; *entered* are new blocks, *gone* removed ones, of
    whatever group and shard.
    """
    for slot in changed:
        key = slots.key_of(slot)
        model = models.get(key.model)
        if model is not None and not is_alone(model):
            slots.classify(others(view, slots, model, key), int(slots.retention[slot]))
    for key in entered:
        model = models.get(key.model)
        if model is None or is_alone(model):
            continue
        standing = BlockKey(key.model, key.prefix_hash, model.layout.spine, 0)
        at = entered_slot(view, slots, standing)
        if at is None:
            continue  # whoever enters it gives its class to all
        mine = (
            others(view, slots, model, standing)
            if key == standing
            else [entered_slot(view, slots, key)]
        )
        slots.classify([each for each in mine if each is not None], int(slots.retention[at]))
    for key in gone:
        model = models.get(key.model)
        if model is not None and not is_alone(model) and (key.group, key.shard) == (
            model.layout.spine, 0,
        ):  # fmt: skip
            left = others(view, slots, model, key)  # no session is over them any more
            slots.classify(left, np.minimum(slots.given[left], NOBODY))


def share_all(slots: Slots, keys: IntArray, spines: Mapping[ModelId, int], at: IntArray) -> None:
    """As share_classes, of all blocks: *keys* are packed and sorted, *at* their slots.

    *spines*: the index of the standing group of every model, by its number.
    """
    if not len(keys):
        return
    width = keys.dtype.itemsize
    rows = np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, width).copy()
    model = np.ascontiguousarray(rows[:, :4]).view(">u4").ravel()
    rows[:, 20:] = 0
    for number, spine in spines.items():
        rows[model == number, 20] = spine
    wanted = rows.view(keys.dtype).ravel()
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[place] == wanted
    slots.retention[at[there]] = slots.retention[at[place[there]]]
