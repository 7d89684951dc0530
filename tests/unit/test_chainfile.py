"""chain.json is deterministic, and an import believes nothing in it that does not fit."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.warehouses import HYBRID, MHA, SHARDED, chain_of, open_warehouse, put_whole
from twfs.errors import InvalidInput
from twfs.layout import Layout
from twfs.units import PrefixHash
from twfs.vfs.chainfile import (
    ChainFile,
    block_name,
    detached_name,
    parse_block_name,
    parse_detached_name,
    write_chain,
)


@given(index=st.integers(0, 10**8))
def test_every_name_can_be_parsed(index: int) -> None:
    for each in (MHA, SHARDED, HYBRID):
        for group in range(len(each.groups)):
            for shard in range(each.shards):
                name = block_name(each, index, group, shard)
                assert parse_block_name(name, each) == (index, group, shard)
                hashed = PrefixHash(index.to_bytes(16, "big"))
                name = detached_name(each, hashed, group, shard)
                assert parse_detached_name(name, each) == (hashed, group, shard)


@pytest.mark.parametrize(
    "name",
    [
        "0.kv", "000000.kv", "00000", "00000.kv ", "00000.s0.kv", "00000.g1.kv", "00000.g9.kv",
        "00000.s99999.kv", "-0001.kv", "00000.KV", "١٢٣٤٥.kv", "", "chain.json",
    ],
)  # fmt: skip
def test_other_names_are_none(name: str) -> None:
    assert parse_block_name(name, MHA) is None


@given(text=st.text(max_size=40))
def test_any_text_is_parsed_without_a_crash(text: str) -> None:
    found = parse_block_name(text, HYBRID)
    assert found is None or block_name(HYBRID, *found) == text
    assert parse_detached_name(text, HYBRID) is None or len(text) > 32


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_chain_or_invalid_input(data: bytes) -> None:
    try:
        ChainFile.parse(data)
    except InvalidInput:
        return


@pytest.mark.parametrize("layout", [MHA, SHARDED, HYBRID])
def test_written_chain_is_read_back_and_checked(scratch: Path, layout: Layout) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", layout)
        names = chain_of(model, 4)
        put_whole(warehouse, model, names)
        info, head = warehouse.models()[0], names.hash_at(3)
        infos = warehouse.chain_of(model.id, head)
        text = write_chain(info, head, infos)
        assert text == write_chain(info, head, warehouse.chain_of(model.id, head))
        chain = ChainFile.parse(text)
        chain.check(info, head)
        assert len(chain.files) == 4 * len(layout.groups) * layout.shards
        for block, stored in zip(chain.blocks, infos, strict=True):
            assert bytes.fromhex(block.digest) == stored.block.digest
            assert bytes.fromhex(block.xxh3) == stored.block.checksums.xxh3
            assert parse_block_name(block.file, layout) == (block.index, block.group, block.shard)
        other = json.loads(text)
        other["blocks"][0]["hash"] = "00" * 16
        with pytest.raises(InvalidInput):
            ChainFile.parse(json.dumps(other).encode()).check(info, head)
