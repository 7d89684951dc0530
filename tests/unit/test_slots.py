"""The arrays in memory: slots are dense and reused, stamps never go back, links are counted right.

The stamps outlive the process; everything else is built again from the records.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from twfs.errors import NoSpaceForImage
from twfs.index import slots as states
from twfs.index.slots import GROWTH_MIN, NONE, Slots
from twfs.records import BLOCK_DTYPE, BlockKey
from twfs.units import ModelId, PrefixHash


def hash_of(number: int) -> PrefixHash:
    return PrefixHash(number.to_bytes(16, "big"))


def enter(slots: Slots, number: int, parent: int | None = None, now_ms: int = 5) -> int:
    """Allot a slot and fill it."""
    (slot,) = slots.allot(1)
    key = BlockKey(ModelId(1), hash_of(number)).pack()
    slots.set_live(slot, key, parent, position=16 * number, units=2, now_ms=now_ms, detached=False)
    return int(slot)


def test_slots_are_dense_and_used_again(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    taken = slots.allot(5)
    assert sorted(taken) == [0, 1, 2, 3, 4]
    slots.give_back(2)
    slots.give_back(4)
    assert sorted(slots.allot(3)) == [2, 4, 5]
    assert len(slots) == 6
    assert slots.statistics()["slots_pending"] == 6
    slots.close()


def test_arrays_grow_without_losing_anything(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    first = enter(slots, 1)
    child = enter(slots, 2, first)
    slots.links[child] = 7
    slots.allot(3 * GROWTH_MIN)
    assert slots.key_of(child) == BlockKey(ModelId(1), hash_of(2))
    assert slots.ancestors(child) == [child, first]
    assert (int(slots.links[child]), int(slots.stamp[child])) == (7, 5)
    assert len(slots.stamp) == len(slots.state) >= 3 * GROWTH_MIN + 2
    assert (tmp_path / "heat").stat().st_blocks * 512 >= slots.stamp.nbytes  # no SIGBUS later
    slots.close()


def test_a_full_disk_costs_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(tmp_path / "heat")
    taken = slots.allot(GROWTH_MIN)
    for slot in taken[:3]:
        slots.give_back(slot)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceForImage, match="make room"):
        slots.allot(4)
    assert sorted(slots.allot(3)) == sorted(taken[:3])
    slots.close()


def test_a_stamp_never_goes_back_also_over_reopening(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    at = enter(slots, 1, now_ms=1000)
    slots.use([at], 400)
    assert slots.stamp[at] == 1000
    slots.use([at], 2000)
    slots.close()
    again = Slots(tmp_path / "heat")
    assert again.stamp[at] == 2000
    again.close()


def test_a_freed_slot_forgets_its_stamp(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    at = enter(slots, 1, now_ms=9_000_000)
    slots.drop(at)
    slots.give_back(at)
    assert enter(slots, 2, now_ms=3) == at
    assert slots.stamp[at] == 3
    slots.close()


def test_leaves_are_live_childless_and_not_leased(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    root = enter(slots, 1)
    left, right, gone = enter(slots, 2, root), enter(slots, 3, root), enter(slots, 4, root)
    slots.leases[right] = 1
    slots.state[gone] = states.CONDEMNED
    slots.allot(1)
    assert slots.leaves().tolist() == [left]
    slots.drop(left)
    slots.give_back(left)
    slots.leases[right] = 0
    assert slots.leaves().tolist() == [right]
    slots.close()


def test_unreachable_are_detached_blocks_and_those_below_a_hole(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    chain = [enter(slots, 1)]
    for number in range(2, 12):
        chain.append(enter(slots, number, chain[-1]))
    alone = enter(slots, 50)
    slots.detached[alone] = True
    assert np.flatnonzero(slots.unreachable()).tolist() == [alone]
    slots.hole[chain[3]] = True
    assert np.flatnonzero(slots.unreachable()).tolist() == sorted([*chain[4:], alone])
    slots.close()


def load(slots: Slots, parents: dict[int, int], heads: set[int], starts: set[int]) -> None:
    """Load blocks named by number; slot 2 * n + 1, in key order."""
    numbers = sorted(parents)
    records = np.zeros(len(numbers), BLOCK_DTYPE)
    records["slot"] = [2 * number + 1 for number in numbers]
    records["parent"] = [np.void(hash_of(parents[number])) for number in numbers]
    records["units"] = 2
    keys = b"".join(BlockKey(ModelId(1), hash_of(number)).pack() for number in numbers)
    first = np.array([number in starts for number in numbers], np.bool_)
    packed = [BlockKey(ModelId(1), hash_of(head)).pack() for head in heads]
    slots.load(keys, records, first, packed)


def test_load_counts_children_and_links_from_the_records(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    slots.stamp[:30] = 77
    # 1 - 2 - 3, 2 - 4 - 5, and 9 below 8, which is not there
    parents = {1: 99, 2: 1, 3: 2, 4: 2, 5: 4, 9: 8}
    load(slots, parents, {3, 5, 1234}, {1})
    at = {number: 2 * number + 1 for number in parents}
    assert {n: int(slots.links[at[n]]) for n in parents} == {1: 2, 2: 2, 3: 1, 4: 1, 5: 1, 9: 0}
    assert {n: int(slots.children[at[n]]) for n in (1, 2, 3, 9)} == {1: 1, 2: 2, 3: 0, 9: 0}
    assert slots.parent[at[9]] == NONE
    assert slots.ancestors(at[5]) == [at[5], at[4], at[2], at[1]]
    assert int(slots.stamp[at[3]]) == 77
    assert not slots.stamp[at[3] + 1]
    assert sorted(slots.allot(14)) == sorted(set(range(20)) - set(at.values()))
    slots.close()


def test_load_hangs_a_first_block_below_nothing(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "heat")
    load(slots, {1: 2, 2: 1, 3: 3}, {2}, {1, 3})
    assert slots.ancestors(5) == [5, 3]
    assert slots.ancestors(7) == [7]
    slots.close()


@pytest.mark.parametrize("heads", [set(), {4}])
def test_load_of_nothing_is_empty_whatever_the_heads_say(tmp_path: Path, heads: set[int]) -> None:
    slots = Slots(tmp_path / "heat")
    load(slots, {}, heads, set())
    assert len(slots) == 0
    assert slots.leaves().size == slots.unreachable().size == 0
    slots.close()
