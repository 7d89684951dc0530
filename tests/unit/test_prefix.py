"""Equal prompts have equal names, however they were fed; different ones have different names.

Also: salt, epoch, extra bytes and layout separate; whatever is no token id is refused.
"""

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from twfs.errors import InvalidInput
from twfs.prefix import (
    Chain,
    Names,
    OwnKey,
    Root,
    joined,
    names_of_keys,
    names_of_run,
    root_of,
    tokens_to_bytes,
)
from twfs.units import KEY_BYTES_MAX

ROOT = root_of(bytes(32), 0)
TOKENS = st.lists(st.integers(0, (1 << 32) - 1), max_size=200)


def names(tokens: Any, root: Root = ROOT, block_tokens: int = 16) -> Names:
    return Chain(root, block_tokens).extend(tokens).names()


@given(TOKENS, st.lists(st.integers(0, 60), max_size=10))
def test_names_do_not_depend_on_how_the_tokens_were_fed(tokens: list[int], cuts: list[int]) -> None:
    chain, rest = Chain(ROOT, 16), tokens
    for cut in cuts:
        chain.extend(rest[:cut])
        rest = rest[cut:]
    chain.extend(np.array(rest, np.uint32))
    assert chain.names() == names(tokens)
    assert len(chain) == len(tokens) // 16
    assert chain.tokens == len(chain) * 16


@given(TOKENS)
def test_names_are_the_formulas_of_the_format(tokens: list[int]) -> None:
    found = names(tokens)
    prefix_hash, digest = bytes(ROOT.prefix_hash), bytes(ROOT.digest)
    for index in range(len(tokens) // 16):
        assert found.parents[16 * index :][:16] == prefix_hash
        packed = struct.pack("<16I", *tokens[16 * index : 16 * index + 16])
        prefix_hash = xxhash.xxh3_128(prefix_hash + packed).digest()
        digest = hashlib.sha256(digest + packed).digest()
        assert found.hash_at(index) == prefix_hash
        assert found.digests[32 * index :][:32] == digest
        assert found.positions[index] == 16 * (index + 1)
    assert len(found) == len(tokens) // 16


@given(st.integers(0, 79), st.integers(1, 1000))
def test_changed_token_changes_its_block_and_all_behind_and_none_before(
    place: int, change: int
) -> None:
    tokens = list(range(80))
    other = list(tokens)
    other[place] += change
    one, two = names(tokens), names(other)
    for index in range(5):
        same = index < place // 16
        assert (one.hash_at(index) == two.hash_at(index)) is same
        assert (one.digests[32 * index :][:32] == two.digests[32 * index :][:32]) is same


def test_layout_epoch_and_salt_separate_all_names() -> None:
    roots = [
        root_of(bytes(32), 0),
        root_of(bytes(31) + b"\1", 0),
        root_of(bytes(32), 1),
        root_of(bytes(32), 0, b"tenant"),
        root_of(bytes(32), 0, b"tenanu"),
    ]
    found = [names(range(32), root) for root in roots]
    assert len({one.hashes[:16] for one in found}) == len(roots)
    assert len({one.hashes[16:] for one in found}) == len(roots)
    assert len({one.digests for one in found}) == len(roots)


def test_extra_bytes_separate_their_block_and_all_behind() -> None:
    plain = names(range(48))
    extra = Chain(ROOT, 16).extend(range(48), [b"", b"lora", b""]).names()
    assert extra.hash_at(0) == plain.hash_at(0)
    assert extra.hash_at(1) != plain.hash_at(1)
    assert extra.hash_at(2) != plain.hash_at(2)
    assert extra.digests[32:] != plain.digests[32:]


@pytest.mark.parametrize("extra", [[b"a"], [b"a"] * 3])
def test_extra_bytes_of_the_wrong_count_are_refused(extra: list[bytes]) -> None:
    with pytest.raises(InvalidInput, match=f"{len(extra)} extra values for 2"):
        Chain(ROOT, 16).extend(range(32), extra)


def test_refused_tokens_leave_the_chain_as_it_was() -> None:
    chain = Chain(ROOT, 16).extend(range(20))
    before = chain.names()
    for bad in ([1, -1], [1 << 32], [1.5], ["a"], np.array([-1]), np.array([0.5]),
                np.array([1 << 32])):  # fmt: skip
        with pytest.raises(InvalidInput, match="token ids"):
            chain.extend(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        chain.extend(range(16), [b"a", b"b"])
    assert chain.names() == before
    assert chain.extend(range(20, 32)).names() == names(range(32))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint32, np.uint64, ">i4"])
def test_arrays_of_all_integer_types_are_the_same_tokens(dtype: Any) -> None:
    assert tokens_to_bytes(np.arange(50).astype(dtype)) == tokens_to_bytes(range(50))
    assert tokens_to_bytes(np.arange(100).astype(dtype)[::2]) == tokens_to_bytes(range(0, 100, 2))


def test_tokens_are_u32_little_endian() -> None:
    assert tokens_to_bytes([1, (1 << 32) - 1]) == b"\1\0\0\0\xff\xff\xff\xff"
    assert tokens_to_bytes([]) == tokens_to_bytes(np.array([], np.int64)) == b""


@given(st.integers(0, 12), st.integers(0, 12))
def test_slices_are_the_names_of_the_same_blocks(start: int, stop: int) -> None:
    whole = names(range(160))
    part = whole.slice(start, stop)
    assert len(part) == len(range(10)[start:stop])
    for index in range(len(part)):
        assert part.hash_at(index) == whole.hash_at(start + index)
        assert part.positions[index] == whole.positions[start + index]
    assert whole.head(3) == names(range(48))


def test_own_keys_name_by_model_epoch_and_salt() -> None:
    keys = [OwnKey(b"first", None, 16), OwnKey(b"second", b"first", 32)]
    found = names_of_keys(ROOT, keys)
    assert found.keys == (b"first", b"second")
    assert found.positions == (16, 32)
    assert found.parents[:16] == bytes(16)
    assert found.parents[16:] == found.hash_at(0)
    other = names_of_keys(root_of(bytes(32), 0, b"salt"), keys)
    assert other.hashes != found.hashes
    assert other.digests != found.digests
    assert found.slice(1, 2).keys == (b"second",)


@pytest.mark.parametrize("count", [0, KEY_BYTES_MAX + 1])
def test_empty_and_long_own_keys_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match=f"key of {count} bytes"):
        names_of_keys(ROOT, [OwnKey(bytes(count))])
    with pytest.raises(InvalidInput, match=f"key of {count} bytes"):
        names_of_keys(ROOT, [OwnKey(b"k", bytes(count))])


@given(st.integers(0, 8), st.integers(0, 8))
def test_a_run_of_keys_has_the_names_of_its_keys(start: int, count: int) -> None:
    keys = [bytes([number + 1]) * 32 for number in range(start + count)]
    chain = [OwnKey(k, keys[i - 1] if i else None, 16 * (i + 1)) for i, k in enumerate(keys)]
    ends = [16 * (i + 1) for i in range(start, start + count)]
    run = names_of_run(ROOT, keys[start:], keys[start - 1] if start else None, ends)
    assert run == names_of_keys(ROOT, chain[start:])
    assert joined([names_of_keys(ROOT, chain[:start]), run]) == names_of_keys(ROOT, chain)


def test_a_run_refuses_keys_as_names_of_keys_does() -> None:
    for keys, parent in (([b""], None), ([b"k" * 65], None), ([b"k"], b"")):
        with pytest.raises(InvalidInput, match="an engine's key has"):
            names_of_run(ROOT, keys, parent, [16])
