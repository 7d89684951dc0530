"""Traces are read as they are published, and their sessions become one stream of known blocks."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.traces import (
    agents,
    conversations,
    needs_traces,
    request,
    write_agents,
    write_mooncake,
    write_session,
)
from twfs.errors import InvalidInput
from twfs_tools.replay import bounds
from twfs_tools.replay.streams import NO_PARENT, make_stream, starts_s
from twfs_tools.replay.traces import halves, read_traces


def test_a_request_has_only_whole_blocks(tmp_path: Path) -> None:
    ids = list(range(1, 12))
    write_session(tmp_path, "a", [request(0, ids, 64 * 11 + 63), request(3, ids[:7])])
    stream = make_stream(read_traces([tmp_path]), window_s=0, seed=0, block_tokens=256)
    assert [chain.tolist() for chain in stream.chains()] == [[0, 1], [0]]
    assert stream.prompt_tokens.tolist() == [64 * 11 + 63, 64 * 7]
    assert (stream.parent.tolist(), stream.depth.tolist()) == ([NO_PARENT, 0], [0, 1])
    assert (stream.stop, stream.at_ms.tolist()) == (["tool_use", "tool_use"], [0, 3000])
    assert stream.answer_tokens.tolist() == [5, 5]


def test_a_block_is_named_by_all_before_it(tmp_path: Path) -> None:
    write_session(tmp_path, "a", [request(0, [1, 2, 3, 4]), request(1, [1, 9, 3, 4])])
    stream = make_stream(read_traces([tmp_path]), window_s=0, seed=0, block_tokens=64)
    assert [chain.tolist() for chain in stream.chains()] == [[0, 1, 2, 3], [0, 4, 5, 6]]


def test_local_ids_mean_another_text_in_another_session(tmp_path: Path) -> None:
    for name in "ab":
        write_session(tmp_path, name, [request(0, [1, 2, 3, 4])])
    assert make_stream(read_traces([tmp_path]), window_s=0, seed=0).unique_blocks == 2
    for name in "ab":
        write_session(tmp_path, name, [request(0, [1, 2, 3, 4])], hash_id_scope="global")
    assert make_stream(read_traces([tmp_path]), window_s=0, seed=0).unique_blocks == 1


def test_kv_of_one_model_is_useless_to_another_and_that_of_a_tenant_too(tmp_path: Path) -> None:
    write_session(
        tmp_path, "a", [request(0, [1, 2, 3, 4]), request(1, [1, 2, 3, 4], model="other")],
        hash_id_scope="global",
    )  # fmt: skip
    write_session(tmp_path, "b", [request(2, [1, 2, 3, 4])], hash_id_scope="global")
    sessions = read_traces([tmp_path])
    stream = make_stream(sessions, window_s=0, seed=0, tenant_of=lambda name: f"t-{name}")
    assert stream.blocks.tolist() == [0, 1, 2]
    assert stream.block_model.tolist() == [0, 1, 0]
    assert [stream.tenants[at] for at in stream.block_tenant] == ["t-a", "t-a", "t-b"]


def test_the_times_of_a_sub_agent_count_from_its_own_start(tmp_path: Path) -> None:
    def sub(at_s: float, *times: float) -> dict[str, object]:
        inner = [request(time, [1, 2, 3, 4, *range(90, 94)]) for time in times]
        return {"t": at_s, "type": "subagent", "agent_id": "x", "requests": inner}

    requests = [request(0, [1, 2, 3, 4]), sub(10, 0, 5), request(12, [1, 2, 3, 4])]
    write_session(tmp_path, "a", requests)
    [session] = read_traces([tmp_path])
    assert [(each.at_s, each.agent) for each in session.requests] == [
        (0, ""), (10, "/x"), (12, ""), (15, "/x"),
    ]  # fmt: skip
    stream = make_stream([session], window_s=0, seed=0)
    assert [stream.sessions[at] for at in stream.session] == ["a", "a/x", "a", "a/x"]
    assert stream.unique_blocks == 2, "a sub-agent shares its session's blocks"
    write_session(tmp_path, "a", [request(0, [1, 2, 3, 4]), sub(10, 11, 15)])
    [session] = read_traces([tmp_path])
    assert [each.at_s for each in session.requests] == [0, 11, 15], "or from the session's"


def test_sub_agents_without_end_are_refused(tmp_path: Path) -> None:
    inner: dict[str, object] = request(0, [1])
    for _ in range(40):
        inner = {"t": 0, "type": "subagent", "requests": [inner]}
    write_session(tmp_path, "a", [inner])
    with pytest.raises(InvalidInput, match="sub-agents within more than"):
        read_traces([tmp_path])


def test_tools_and_system_prompts_that_look_alike_are_shared_on_demand(tmp_path: Path) -> None:
    def session(name: str, tools: int, system: int) -> None:
        ids = list(range(1, 21))
        write_session(
            tmp_path, name, [request(0, ids), request(1, [*ids, *range(21, 25)])],
            tool_tokens=tools, system_tokens=system,
        )  # fmt: skip

    session("a", 600, 500)  # whole blocks of tools: 2, of both: 4
    session("b", 600, 500)
    session("c", 600, 300)  # both: 3, and the third is of another system prompt
    sessions = read_traces([tmp_path])
    apart = make_stream(sessions, window_s=0, seed=0)
    shared = make_stream(sessions, window_s=0, seed=0, share_prefixes=True)
    assert apart.unique_blocks == 18
    firsts = {
        shared.sessions[shared.session[number]]: shared.chain(number).tolist()
        for number in range(3)
    }
    common = {
        pair: int((np.array(firsts[pair[0]][:5]) == np.array(firsts[pair[1]][:5])).sum())
        for pair in ("ab", "ac", "bc")
    }
    assert common == {"ab": 4, "ac": 2, "bc": 2}
    assert shared.unique_blocks == 18 - 4 - 2
    whose = make_stream(
        sessions, window_s=0, seed=0, share_prefixes=True, tenant_of=lambda name: name
    )
    assert whose.unique_blocks == 18, "but never between tenants"


def test_mooncake_has_times_of_its_own_and_partial_last_blocks(tmp_path: Path) -> None:
    path = write_mooncake(
        tmp_path, [(0, [0, 1], 1024), (2000, [0, 1, 2], 1500), (1000, [0, 5], 1024)]
    )
    [session] = read_traces([path])
    assert starts_s([session], 3600.0, 1) == [0.0]
    stream = make_stream([session], window_s=3600, seed=1)
    assert stream.at_ms.tolist() == [0, 1000, 2000]
    assert [chain.tolist() for chain in stream.chains()] == [[0, 1], [0, 2], [0, 1]]
    assert (stream.block_tokens, stream.prompt_tokens.tolist()) == (512, [1024, 1024, 1500])


def test_starts_are_drawn_over_the_window_from_the_seed(tmp_path: Path) -> None:
    write_agents(tmp_path, sessions=20, turns=3)
    sessions = read_traces([tmp_path])
    drawn = starts_s(sessions, 3600.0, 7)
    assert drawn == starts_s(sessions, 3600.0, 7) != starts_s(sessions, 3600.0, 8)
    assert 0 <= min(drawn) < max(drawn) <= 3600
    stream = make_stream(sessions, window_s=3600.0, seed=7)
    assert (np.diff(stream.at_ms) > 0).all(), "every request has a moment of its own"
    learn, report = halves(sessions)
    assert sorted(each.name for each in learn + report) == [each.name for each in sessions]
    assert len(learn) == len(report) == 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "a.json"),
        (json.dumps({"id": "a", "requests": []}), "block_size"),
        (json.dumps({"id": "a", "block_size": 64, "requests": [{"t": -1}]}), r"\.t"),
        (json.dumps({"id": "a", "block_size": 64, "requests": [{"t": 0, "in": -5}]}), r"\.in"),
        (
            json.dumps({"id": "a", "block_size": 64, "requests": [], "hash_id_scope": "x"}),
            "hash_id_scope",
        ),
        (json.dumps({"id": "a", "block_size": 64, "requests": []}), "no request"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_sentence(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InvalidInput, match=why):
        read_traces([tmp_path])


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n\n{"timestamp": 1}\n')
    with pytest.raises(InvalidInput, match="line 3"):
        read_traces([path])
    with pytest.raises(InvalidInput, match="no request"):
        read_traces([tmp_path / "empty-folder-that-is-not-there"][:0])


def test_blocks_are_whole_numbers_of_the_trace_s_ids(tmp_path: Path) -> None:
    write_session(tmp_path, "a", [request(0, [1, 2, 3])])
    with pytest.raises(InvalidInput, match="100 tokens from ids of 64"):
        make_stream(read_traces([tmp_path]), window_s=0, seed=0, block_tokens=100)


@needs_traces
def test_the_public_sessions_have_the_known_footprint_and_ceiling() -> None:
    sessions = read_traces([agents()])
    stream = make_stream(sessions, window_s=3600, seed=1, block_tokens=256)
    assert (len(sessions), stream.unique_blocks) == (80, 59_559)
    held = bounds.ceiling(stream).sum() * 256 / stream.prompt_tokens.sum()
    assert round(100 * held, 1) == 94.4
    shared = make_stream(sessions, window_s=3600, seed=1, share_prefixes=True)
    held = bounds.ceiling(shared).sum() * 256 / shared.prompt_tokens.sum()
    assert round(100 * held, 1) == 94.6
    mooncake = make_stream(read_traces([conversations()]), window_s=0, seed=0)
    held = bounds.ceiling(mooncake).sum() * 512 / mooncake.prompt_tokens.sum()
    assert round(100 * held) == 37
