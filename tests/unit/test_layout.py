"""A layout says how many bytes a block has, and its fingerprint changes with all that it means.

What cannot be is refused when the layout is made, with the number in the text.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twfs.errors import InvalidInput
from twfs.layout import (
    DTYPE_BITS,
    GROUPS_MAX,
    LAYERS_MAX,
    SHARDS_MAX,
    Arrangement,
    Group,
    GroupKind,
    Layout,
    check_model_name,
)
from twfs.units import BLOCK_BYTES_MAX, NAME_BYTES_MAX

GROUP = Group(layers=4, kv_heads=2, head_size=8)
LAYOUT = Layout("org/model", (GROUP,), 16, revision="abc", overrides={"rope": "yarn"})
STATE = Group(
    layers=2, kind=GroupKind.STATE, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=1000
)


@pytest.mark.parametrize(
    ("layout", "token_bytes"),
    [
        (Layout("l70", (Group(layers=80, kv_heads=8, head_size=128),), 256), 327_680),
        (Layout("l8", (Group(layers=32, kv_heads=8, head_size=128),), 256), 131_072),
        (Layout("q7", (Group(layers=28, kv_heads=4, head_size=128),), 256), 57_344),
        (
            Layout(
                "ds3",
                (Group(layers=61, head_size=576, arrangement=Arrangement.LAYER_LATENT),),
                64,
                replicated=True,
            ),
            70_272,
        ),
    ],
)
def test_block_bytes_are_those_of_known_models(layout: Layout, token_bytes: int) -> None:
    assert layout.block_bytes() == token_bytes * layout.block_tokens


def test_shards_divide_the_heads() -> None:
    layout = Layout("m", (Group(layers=80, kv_heads=8, head_size=128),), 256, shards=8)
    assert layout.block_bytes() == 327_680 * 256 // 8
    with pytest.raises(InvalidInput, match="8 KV heads cannot be cut into 3 shards"):
        replace(layout, shards=3)


def test_sub_byte_values_take_whole_bytes() -> None:
    group = Group(layers=3, kv_heads=1, head_size=1, dtype="int4")
    assert Layout("m", (group,), 17).layer_bytes(0) == 17
    assert Layout("m", (group,), 17).block_bytes() == 51


def test_stated_layer_bytes_replace_the_formula() -> None:
    layout = Layout("m", (GROUP, STATE), 16)
    assert layout.block_bytes(0) == 4 * 2 * 16 * 2 * 8 * 2
    assert layout.block_bytes(1) == 2000


@pytest.mark.parametrize(
    ("arrangement", "summed"),
    [
        (Arrangement.LAYER_KV_HEAD_TOKEN, 4),
        (Arrangement.LAYER_LATENT, 4),
        (Arrangement.TOKEN_OUTERMOST, 0),
        (Arrangement.LAYER_OPAQUE, 4),
        (Arrangement.OPAQUE, 0),
    ],
)
def test_layers_are_summed_where_they_are_runs_of_bytes(
    arrangement: Arrangement, summed: int
) -> None:
    layout = Layout("m", (replace(GROUP, arrangement=arrangement, layer_bytes=512),), 16)
    assert layout.summed_layers(0) == summed


def test_first_full_group_stands_for_a_block() -> None:
    assert LAYOUT.spine == 0
    assert Layout("m", (STATE, GROUP), 16).spine == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "org/other"},
        {"revision": "abd"},
        {"block_tokens": 32},
        {"shards": 2},
        {"engine": "vllm"},
        {"overrides": {"rope": "none"}},
        {"overrides": {}},
        {"groups": (GROUP, GROUP)},
        {"groups": (replace(GROUP, layers=5),)},
        {"groups": (replace(GROUP, kv_heads=4),)},
        {"groups": (replace(GROUP, head_size=16),)},
        {"groups": (replace(GROUP, dtype="float16"),)},
        {"groups": (replace(GROUP, arrangement=Arrangement.TOKEN_OUTERMOST),)},
        {"groups": (replace(GROUP, layer_bytes=1024),)},
        {"groups": (GROUP, STATE)},
    ],
)
def test_fingerprint_changes_with_everything_that_the_bytes_mean(changed: dict[str, Any]) -> None:
    other = replace(LAYOUT, **changed)
    assert other.fingerprint != LAYOUT.fingerprint
    (name,) = changed
    assert LAYOUT.differences(other).startswith(f"{name}: ")
    assert LAYOUT.differences(LAYOUT) == ""


def test_fingerprint_does_not_depend_on_the_order_of_overrides() -> None:
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert (
        replace(LAYOUT, overrides=one).fingerprint == replace(LAYOUT, overrides=other).fingerprint
    )


@pytest.mark.parametrize("layout", [LAYOUT, Layout("m", (GROUP, STATE), 64, shards=2)])
def test_layout_comes_back_from_json(layout: Layout) -> None:
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.fingerprint == layout.fingerprint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(LAYOUT.to_dict())), JSON)
def test_anything_else_is_refused_as_invalid_input_only(name: str, nonsense: object) -> None:
    try:
        layout = Layout.from_dict({**LAYOUT.to_dict(), name: nonsense})
    except InvalidInput:
        return
    assert layout.block_bytes() > 0


@pytest.mark.parametrize("missing", ["model", "groups", "block_tokens"])
def test_json_without_a_needed_field_is_refused(missing: str) -> None:
    data = LAYOUT.to_dict()
    del data[missing]
    with pytest.raises(InvalidInput, match=missing):
        Layout.from_dict(data)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"block_tokens": 15}, "15"),
        ({"block_tokens": 4097}, "4097"),
        ({"shards": 0}, "0"),
        ({"shards": SHARDS_MAX + 1}, str(SHARDS_MAX + 1)),
        ({"replicated": True, "shards": 2}, "one shard"),
        ({"groups": ()}, "0"),
        ({"groups": (GROUP,) * (GROUPS_MAX + 1)}, str(GROUPS_MAX + 1)),
        ({"groups": (STATE,)}, "kind full"),
    ],
)
def test_impossible_layouts_are_refused_with_the_number(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        replace(LAYOUT, **changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"layers": 0}, "layers"),
        ({"layers": LAYERS_MAX + 1}, "layers"),
        ({"kv_heads": 0}, "KV head"),
        ({"head_size": 0}, "head size"),
        ({"dtype": "float12"}, "float12"),
        ({"kind": GroupKind.WINDOW}, "window_tokens"),
        ({"window_tokens": 5}, "window_tokens"),
        ({"kind": GroupKind.WINDOW, "window_tokens": 0}, "window of 0"),
        ({"kind": GroupKind.STATE}, "layer_bytes"),
        ({"arrangement": Arrangement.OPAQUE}, "layer_bytes"),
        ({"layer_bytes": 0}, "0 bytes"),
        ({"layer_bytes": BLOCK_BYTES_MAX}, str(4 * BLOCK_BYTES_MAX)),
    ],
)
def test_impossible_groups_are_refused_with_the_number(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Layout("m", (GROUP, replace(GROUP, **changed)), 16)


def test_all_dtypes_have_a_size() -> None:
    for name, bits in DTYPE_BITS.items():
        group = Group(layers=1, kv_heads=1, head_size=8, dtype=name)
        assert Layout("m", (group,), 16).block_bytes() == 2 * 16 * 8 * bits // 8


@pytest.mark.parametrize(
    "name", ["a", "Llama-3.1_8B", "org--model", "=x", "m" * NAME_BYTES_MAX, "0", "_"]
)
def test_names_that_are_safe_directories_are_taken(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".twfs", "-rf", "a/b", "a b", "a\n", "a\0", "ä", "m" * (NAME_BYTES_MAX + 1),
     "detached"],
)  # fmt: skip
def test_names_that_are_not_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name a model"):
        check_model_name(name)
