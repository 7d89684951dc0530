"""Guaranteed: other weights have another revision, and what a request says wrongly is left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from twfs.engines.breakeven import DEADLINE_S, BreakEven
from twfs.engines.identity import config_hash, name_of_model, revision_of_files
from twfs.engines.requests import NO_PARAMS, params_of
from twfs.errors import InvalidInput
from twfs.hints import Hint, Retention, Stop
from twfs.layout import check_model_name


def safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    """Write a file as safetensors does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors(folder / "model.safetensors", {"a": bytes(100_000), "b": bytes(range(256)) * 40})
    return folder


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_a_changed_tensor_is_another_revision_under_the_same_path(model: Path, place: int) -> None:
    before = revision_of_files(model)
    data = bytearray(100_000)
    data[place] = 1
    safetensors(model / "model.safetensors", {"a": bytes(data), "b": bytes(range(256)) * 40})
    assert revision_of_files(model) != before


def test_the_same_weights_elsewhere_and_later_are_the_same_revision(
    model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert revision_of_files(tmp_path / "copy") == revision_of_files(model)
    (model / "model.safetensors.index.json").write_text("{}")
    assert revision_of_files(tmp_path / "copy") != revision_of_files(model)


def test_a_snapshot_of_a_hub_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert revision_of_files(tmp_path / "snapshots" / commit) == commit[:32]


def test_other_files_of_weights_count_too(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"one")
    before = revision_of_files(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"two")
    assert revision_of_files(tmp_path) != before
    assert revision_of_files(tmp_path / "model.gguf") != before


@pytest.mark.parametrize(
    "header", [b"", (1 << 40).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"[1]}"]
)
def test_broken_and_absent_weights_are_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(InvalidInput, match="no weights"):
        revision_of_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(InvalidInput, match="no safetensors file"):
        revision_of_files(tmp_path)


def test_a_config_is_named_by_what_changes_kv() -> None:
    config = {"rope_theta": 1e6, "architectures": ["A"], "_name_or_path": "/x"}
    assert config_hash(config) == config_hash({"rope_theta": 1e6, "transformers_version": "6"})
    assert config_hash(config) != config_hash(config | {"rope_theta": 2e6})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama--Llama-3.1-8B"),
        ("/models/some/tiny/", "tiny"),
        ("./x y", "x_y"),
        ("/", "model"),
        ("detached", "detached"),
    ],
)
def test_a_model_is_named_for_a_directory(given: str, name: str) -> None:
    assert name_of_model(given) == name
    check_model_name(f"{name}-01234567")


def test_a_long_name_leaves_room_for_the_fingerprint() -> None:
    check_model_name(f"{name_of_model('a' * 300)}-01234567")


def test_a_request_says_whose_it_is_and_when_it_is_back() -> None:
    assert params_of(None) == (NO_PARAMS, [])
    given = {
        "tenant": "acme", "session": "s", "class": "durable", "stop": "tool_use", "return_ms": 7,
        "public_tokens": 9,
    }  # fmt: skip
    params, wrong = params_of({"twfs": given})
    assert wrong == []
    assert (params.tenant, params.public_tokens) == ("acme", 9)
    assert params.hint == Hint("s", Retention.DURABLE, Stop.TOOL_USE, 7)


@pytest.mark.parametrize(
    "given",
    [7, {"class": "gold"}, {"stop": 1}, {"return_ms": -1}, {"return_ms": True}, {"tenant": 3},
     {"public_tokens": -1},
     {"session": "x" * 200}, {"colour": "red"}, {"session": "\udc80"}],
)  # fmt: skip
def test_what_a_request_says_wrongly_is_left_out_and_told(given: object) -> None:
    params, wrong = params_of({"twfs": given})
    assert params == NO_PARAMS
    assert len(wrong) == 1


def test_loading_pays_where_it_is_sooner_done() -> None:
    even = BreakEven()
    assert even.pays(1)
    assert even.deadline_s(100) == DEADLINE_S
    even.computed(1000, 1.0)
    even.loaded(1000, 0.1)
    assert even.pays(1000)
    assert not even.pays(5)
    assert even.deadline_s(500) == 0.5
    assert even.deadline_s(1_000_000) == DEADLINE_S
    even.computed(10, 5.0)  # a step of decoding says nothing of computing a prompt
    assert even.deadline_s(500) == 0.5


def test_a_store_that_was_slow_once_is_tried_again() -> None:
    even = BreakEven()
    even.computed(1000, 1.0)
    even.loaded(100, 1.0)
    tries = 0
    while not even.pays(1000):
        tries += 1
    assert 0 < tries < 100
    assert even.declined == tries


def test_a_least_length_decides_alone() -> None:
    even = BreakEven(tokens_min=512, deadline_s=7.0)
    even.computed(1000, 1.0)
    assert even.deadline_s(10) == 7.0
    even.computed(1000, 1.0)
    even.loaded(1000, 9.0)
    assert even.pays(512)
    assert not even.pays(511)


@pytest.mark.parametrize(
    "given",
    [{"tokens_min": "512"}, {"tokens_min": -1}, {"tokens_min": True}, {"tokens_min": 0.5},
     {"deadline_s": "2"}, {"deadline_s": 0}, {"deadline_s": -1.0}, {"deadline_s": float("nan")}],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_refused_at_the_engines_start(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="give"):
        BreakEven(**given)
