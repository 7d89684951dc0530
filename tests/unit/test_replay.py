"""A replay is of the real warehouse: its LRU is the exact one, and its sums are the warehouse's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.merge_replays import merged
from support.cli import assert_refused, document, twfs
from support.traces import request, write_agents, write_session
from twfs.checking import invariants
from twfs.config import Config, EvictionSettings
from twfs.errors import DeviceError, NoSpaceForImage
from twfs.eviction import evicting
from twfs.hints import Retention
from twfs.store import CheckReport, Finding
from twfs_tools.replay import bounds, drive
from twfs_tools.replay.naming import Payloads
from twfs_tools.replay.options import class_map, tenants_made
from twfs_tools.replay.plan import Plan
from twfs_tools.replay.plan import run as run_plan
from twfs_tools.replay.streams import IntArray, Stream, make_stream
from twfs_tools.replay.traces import Agent, Request, Session, read_traces


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    write_agents(tmp_path, sessions=8, turns=12)
    return make_stream(read_traces([tmp_path]), window_s=600, seed=1)


@pytest.fixture
def without_low_water(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is evicted ahead of demand, as in an LRU of a textbook."""
    monkeypatch.setattr(evicting, "LOW_WATER_PARTS", 1 << 60)


def nothing(stream: Stream) -> IntArray:
    return np.zeros(len(stream), np.int64)


def lru_config() -> Config:
    """Eviction by the last use alone."""
    return Config(eviction=EvictionSettings(policy="lru"))


@pytest.mark.usefixtures("without_low_water")
@pytest.mark.parametrize("capacity", [5, 40, 110])
def test_recency_in_the_warehouse_is_the_exact_lru_request_by_request(
    stream: Stream, scratch: Path, capacity: int
) -> None:
    assert capacity < stream.unique_blocks
    setup = drive.Setup(capacity, config=lru_config(), hints=drive.Hints.NONE)
    done = drive.replay(stream, setup, scratch, nothing(stream))
    [exact] = bounds.lru(stream, [capacity])
    assert done.findings == []
    assert done.hits.tolist() == exact.blocks.tolist()
    assert done.published.sum() == exact.written_blocks
    assert done.published.sum() + done.refused.sum() == (stream.lengths() - done.hits).sum()
    assert (done.refused > 0).any() == (stream.lengths().max() > capacity)


@pytest.mark.parametrize("payload_bytes", [4096, 100_000])
def test_all_is_kept_where_all_has_room_and_reads_back(
    stream: Stream, scratch: Path, payload_bytes: int
) -> None:
    setup = drive.Setup(2 * stream.unique_blocks, payload_bytes, read_part=1.0)
    done = drive.replay(stream, setup, scratch, nothing(stream))
    assert done.findings == []
    assert (done.hits == bounds.ceiling(stream)).all()
    assert (done.published.sum(), done.evicted_blocks) == (stream.unique_blocks, 0)
    assert done.read_blocks == done.hits.sum() > 0
    assert done.used_bytes == stream.unique_blocks * done.unit_bytes
    assert list(scratch.iterdir()) == [], "no scratch is left"


def test_policies_see_the_time_of_the_trace(stream: Stream, scratch: Path) -> None:
    stamps: list[int] = []

    def look(warehouse: Any) -> None:
        stamps.append(int(warehouse._core.clock()))
        stamps.append(0)

    clock = drive.TraceClock()
    setup = drive.Setup(stream.unique_blocks, prepare=look)
    with drive.scratch_warehouse(setup, clock, scratch) as warehouse:
        under_way = drive._Run(stream, setup, warehouse, clock, nothing(stream))
        for number in range(len(stream)):
            under_way.request(number)
            heat = warehouse._core.slots.stamp
            assert int(heat.max()) == drive.BEGINNING_MS + int(stream.at_ms[number])
    assert stream.at_ms[-1] > 600_000


def test_a_byte_that_is_read_back_wrong_ends_the_replay(
    stream: Stream, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = Payloads(100_000 // 4096 * 4096)
    whole = np.concatenate([np.asarray(piece) for piece in payloads.of(7)])
    assert payloads.is_of(7, whole)
    for at in (0, len(whole) - 1):
        spoilt = whole.copy()
        spoilt[at] ^= 1
        assert not payloads.is_of(7, spoilt)
    assert not payloads.is_of(8, whole)
    monkeypatch.setattr(Payloads, "is_of", lambda *_: False)
    with pytest.raises(DeviceError, match="was read back"):
        drive.replay(stream, drive.Setup(500, read_part=1.0), scratch, nothing(stream))
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("without_low_water")
def test_what_the_engine_holds_itself_is_not_asked_for_and_touches_count(
    stream: Stream, scratch: Path
) -> None:
    front = bounds.lru(stream, [30])[0].blocks
    assert front.sum() > 0
    hits = {}
    for touch in (True, False):
        setup = drive.Setup(
            60,
            config=lru_config(),
            hints=drive.Hints.NONE,
            front_blocks=30,
            touch=touch,
            read_part=1.0,
        )
        done = drive.replay(stream, setup, scratch, front)
        assert done.findings == []
        assert (done.hits >= front).all()
        hits[touch] = int(done.hits.sum())
        # Where the engine's memory held all of a request, nothing is asked or put.
        whole = front == stream.lengths()
        assert whole.any()
        assert done.published[whole].sum() == 0
    assert hits[True] >= hits[False], "an LRU that does not hear of uses forgets what is in use"


def test_classes_and_tenants_reach_the_warehouse(tmp_path: Path, scratch: Path) -> None:
    for name in "ab":
        write_session(tmp_path, name, [request(at, list(range(1, 41))) for at in range(3)])
    sessions = read_traces([tmp_path])
    stream = make_stream(sessions, window_s=0, seed=0, tenant_of=lambda name: f"of-{name}")
    seen: dict[str, Retention] = {}
    setup = drive.Setup(100, class_of=class_map(["a=durable"]))
    quotas, weights = {"of-b": 5 * setup.unit_bytes}, {"of-a": 3}
    setup = replace(setup, prepare=tenants_made(stream.tenants, quotas, weights))
    held: dict[str, int] = {}
    clock = drive.TraceClock()
    with drive.scratch_warehouse(setup, clock, scratch) as warehouse:
        setup.prepare(warehouse)
        run = drive._Run(stream, setup, warehouse, clock, nothing(stream))
        for number in range(len(stream)):
            run.request(number)
        [model] = warehouse.models()
        for info in warehouse.sessions(model.id):
            seen[info.tenant] = info.retention
            held[info.tenant] = info.blocks
        run.finish()
        assert run.outcome.findings == []
    assert seen == {"of-a": Retention.DURABLE, "of-b": Retention.STANDARD}
    assert held["of-a"] == 10
    assert 0 < held["of-b"] <= 5
    refused = [int(run.outcome.refused[stream.tenant == number].sum()) for number in range(2)]
    assert refused[0] == 0
    assert refused[1] >= 15


def test_what_the_checker_finds_afterwards_is_found(
    stream: Stream, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = CheckReport((Finding(7, "made up"),), 3, 3, 0.0)
    monkeypatch.setattr(invariants, "run", lambda *_, **__: report)
    done = drive.replay(stream, drive.Setup(500), scratch, nothing(stream))
    assert "I7: made up" in done.findings
    assert any("blocks left" in each for each in done.findings), "3 are not what was published"


def test_a_disk_without_room_is_refused_before_anything_is_made(
    stream: Stream, scratch: Path
) -> None:
    setup = drive.Setup(1 << 40)
    with pytest.raises(NoSpaceForImage, match="less capacity"):
        drive.replay(stream, setup, scratch, nothing(stream))
    assert list(scratch.iterdir()) == []


def test_the_command_prints_one_document_with_every_run(tmp_path: Path, scratch: Path) -> None:
    write_agents(tmp_path, sessions=6, turns=6)
    plot = scratch / "plots" / "curve.png"
    report = document(
        "replay", tmp_path, "--capacity", "20%", "--capacity", "100%", "--seeds", "2", "--window",
        "10m", "--tenants", "2", "--class-map", "trace_000[0-2]=durable", "--directory", scratch,
        "--plot", plot, "--read", "0.5",
    )  # fmt: skip
    runs = report["runs"]
    replayed = [run for run in runs if run["replayed"]]
    assert len(replayed) == 4
    assert {run["policy"] for run in runs} == {"exact lru", "optimum", "default"}
    for run in replayed:
        assert run["findings"] == []
        assert run["capacity_bytes"] == run["capacity_blocks"] * 256 * 327_680
        assert run["written_bytes"] == run["written_blocks"] * 256 * 327_680
        assert run["physical_written_bytes"] == run["written_blocks"] * run["physical_block_bytes"]
        assert [each["name"] for each in run["tenants"]] == ["tenant1", "tenant2"]
        assert {each["name"] for each in run["classes"]} == {"durable", "standard"}
        for parts in (run["tenants"], run["classes"]):
            assert sum(part["written_blocks"] for part in parts) == run["written_blocks"]
            assert sum(part["requests"] for part in parts) == 36
        assert run["lookups_per_s"] > 0 < run["publishes_per_s"]
    whole = [row for row in report["summary"] if row["capacity_part"] == 1.0]
    assert all(row["of_ceiling"] == pytest.approx(1.0, abs=0.02) for row in whole)
    optimum = {run["capacity_part"]: run for run in runs if run["policy"] == "optimum"}
    assert all(run["hit_rate"] <= optimum[run["capacity_part"]]["hit_rate"] + 0.2 for run in runs)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in scratch.iterdir()] == ["plots"]


def test_the_command_prints_tables_for_people(tmp_path: Path, scratch: Path) -> None:
    write_agents(tmp_path, sessions=3, turns=3)
    done = twfs("replay", tmp_path, "--capacity", "50%", "--directory", scratch)
    assert done.returncode == 0, done.stderr
    assert "9 requests of 3 sessions" in done.stdout
    for word in ("exact lru", "optimum", "default", "clean", "look-ups/s"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--window", "1y"), "no span of time"),
        (("--seeds", "x"), "names no seeds"),
        (("--capacity", "0%"), "less than one block"),
        (("--class-map", "a=silver"), "no class"),
        (("--class-map", "silver"), "is not PATTERN=CLASS"),
        (("--half", "third"), "learn or report"),
        (("--policy", "clairvoyant"), "clairvoyant"),
        (("--block-tokens", "100"), "tokens from ids of 64"),
        (("--directory", "/nonexistent"), "not a directory"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_a_sentence(
    tmp_path: Path, options: tuple[str, str], why: str
) -> None:
    write_agents(tmp_path, sessions=2, turns=2)
    line = assert_refused(twfs("replay", tmp_path, *options), 2)
    assert why in line


def test_the_settings_of_the_warehouse_are_given_by_a_file(tmp_path: Path, scratch: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    write_agents(traces, sessions=2, turns=2)
    config = tmp_path / "twfs.toml"
    config.write_text("[retention.durable]\nttl = '1h'\n[admission]\nsecond_touch = ['standard']\n")
    arguments = ("replay", traces, "--capacity", "100%", "--directory", scratch, "--config", config)
    report = document(*arguments)
    assert "ttl" in report["settings"]["config"]
    [run] = [each for each in report["runs"] if each["replayed"]]
    assert run["counters"]["first_touch_blocks"] > 0, "what is asked for once is not written"
    assert run["written_per_unique"] < 1
    config.write_text("[nonsense]\n")
    assert "nonsense" in assert_refused(twfs(*arguments), 2)


def test_documents_of_seeds_that_ran_apart_are_as_those_of_one_run(tmp_path: Path) -> None:
    write_agents(tmp_path, sessions=6, turns=6)
    plan = Plan(read_traces([tmp_path]), ["agents"], capacities=["5%", "50%"], warehouse=False)
    apart = [run_plan(replace(plan, seeds=[seed]), lambda _: None) for seed in (2, 1, 2)]
    together = run_plan(replace(plan, seeds=[1, 2]), lambda _: None)
    document = merged(apart)
    assert document["settings"]["seeds"] == [1, 2]

    def by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, float], tuple[float, float]]:
        return {
            (row["policy"], row["capacity_part"]): (row["hit_rate"], row["hit_rate_sd"])
            for row in rows
        }

    mine, its = by_key(document["summary"]), by_key(together["summary"])
    assert mine.keys() == its.keys()
    assert all(mine[key] == pytest.approx(its[key]) for key in its)
    assert len(document["runs"]) == len(together["runs"]) == 8


def test_puts_and_touches_come_when_the_answer_has_ended(scratch: Path) -> None:
    ids = tuple(range(1, 9))
    requests = (
        Request(0.0, "", "m", ids[:4], 1024, 1, "tool_use", None, 7.0),
        Request(20.0, "", "m", ids, 2048, 1, "end_turn", 13.0, 90.0),
        Request(60.0, "", "m", ids, 2048, 1, "", 0.0),  # before the answer has ended, it seems
    )
    sessions = [Session("s", "s", 256, requests, {"": Agent()}, absolute=True)]
    stream = make_stream(sessions, window_s=0.0, seed=1)
    assert stream.moments() == [
        (0, 0, False), (7000, 0, True), (20_000, 1, False), (59_999, 1, True),
        (60_000, 2, False), (60_000, 2, True),
    ]  # fmt: skip
    setup = drive.Setup(500, hints=drive.Hints.ANSWER)
    done = drive.replay(stream, setup, scratch, nothing(stream))
    assert done.findings == []
    assert (done.hits.tolist(), done.published.tolist()) == ([0, 4, 8], [4, 4, 0])


def test_a_session_that_is_over_is_deleted_and_what_others_use_stays(scratch: Path) -> None:
    agent, other = tuple(range(1, 9)), (1, 2, 3, 4, *range(11, 15))
    sessions = [
        Session(
            "s", "s", 256,
            (
                Request(0.0, "", "m", agent, 2048, 1, "tool_use", None, 1.0),
                Request(5.0, "/helper", "m", other, 2048, 1, "end_turn", None, 1.0),
                Request(9.0, "/helper", "m", other[:2], 512, 1, "end_turn", None, 1.0),
                Request(20.0, "", "m", other, 2048, 1, "tool_use", None, 1.0),
            ),
            {"": Agent(), "/helper": Agent()}, absolute=True,
        )
    ]  # fmt: skip
    stream = make_stream(sessions, window_s=0.0, seed=1)
    done = {
        hints: drive.replay(stream, drive.Setup(500, hints=hints), scratch, nothing(stream))
        for hints in (drive.Hints.ANSWER, drive.Hints.ENDS)
    }
    assert [each.findings for each in done.values()] == [[], []]
    assert done[drive.Hints.ANSWER].hits.tolist() == [0, 4, 2, 8]
    ends = done[drive.Hints.ENDS]
    assert ends.hits.tolist() == [0, 4, 2, 4], "of the helper's the agent's stay"
    counters = ends.statistics["counters"]
    assert (counters["forgotten_sessions"], counters["removed_blocks"]) == (2, 8)
    assert ends.used_bytes == 8 * ends.unit_bytes, "what it turned away from is no session's: stays"
