"""What `twfs advise` predicts is what a warehouse does, and what it says of prompts is there.

The miniature is compared with a store that looks at every block, and with replays through the real
one.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from support.cli import assert_refused, document, made_warehouse, running_daemon, twfs
from support.recording import MODEL, SECRET, Clock, match, names_of
from support.traces import agents, needs_traces, write_agents
from support.warehouses import (
    MHA,
    SHARDED,
    chain_of,
    open_warehouse,
    payloads_of,
    put,
    put_whole,
    tokens_of,
)
from twfs import connect
from twfs.admin.advising import Live, Wishes, advise
from twfs.admin.divergence import partings
from twfs.config import RecordSettings
from twfs.errors import InvalidInput
from twfs.hints import Stop
from twfs.policy.accesses import Group, Kind, read_record, segments_in
from twfs.policy.asking import Asked, asked_of, live_sessions, within_bounds
from twfs.policy.miniature import simulate
from twfs.policy.recording import Recorder, units_of
from twfs.policy.scoring import Policy, Reuse, policy_of
from twfs.units import ModelId
from twfs_tools.replay import bounds
from twfs_tools.replay.streams import Stream, make_stream
from twfs_tools.replay.traces import read_traces

BLOCK_BYTES: Final = 2 * 4096  # of MHA: a header, and a payload that fits 4 KiB
PARTS: Final = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


STOPS: Final = {"tool_use": Stop.TOOL_USE.code, "end_turn": Stop.END_TURN.code}


def recorded(stream: Stream, directory: Path, *, size: int = 64 << 20) -> Group:
    """The record of *stream*, as a store that holds nothing notes it."""
    clock = Clock()
    begin = clock.now_ms
    record = Recorder(directory, RecordSettings(bytes=size, days=365), clock, SECRET)
    whole = np.frombuffer(names_of(0, stream.unique_blocks), "V16")
    for done, (ms, number, ended) in enumerate(stream.moments()):
        clock.now_ms = begin + ms
        names = whole[stream.chain(number)].tobytes()
        code = STOPS.get(stream.stop[number], 0) if ended else 0
        for kind in (Kind.PUT, Kind.TOUCH) if ended else (Kind.MATCH,):
            record.note(
                kind, MODEL, MHA, names, tenant=int(stream.tenant[number]), retention=1, stop=code
            )
        if done % 50 == 0:
            record.flush(0)
    record.flush(0)
    return read_record(directory)


class Plain:
    """A store of single blocks: each knows when it was used, how that ended, and whose it is."""

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity, self.policy = capacity, policy
        self.blocks: dict[int, tuple[int, int, int]] = {}  # used_ms, stop, session
        self.latest: dict[int, int] = {}

    def leading(self, chain: Sequence[int]) -> int:
        return next((at for at, each in enumerate(chain) if each not in self.blocks), len(chain))

    def match(self, chain: Sequence[int], ms: int, session: int) -> int:
        held = self.leading(chain)
        for block in chain[:held]:
            self.blocks[block] = (ms, 0, session)
        return held

    def end(
        self, chain: Sequence[int], ms: int, stop: int, session: int, parent: dict[int, int]
    ) -> None:
        for block in chain:
            self.blocks[block] = (ms, stop, session)
        self.latest[session] = ms
        while len(self.blocks) > self.capacity:
            above = {parent[block] for block in self.blocks}
            leaves = [block for block in self.blocks if block not in above]
            del self.blocks[min(leaves, key=lambda block: self.worth(block, ms))]

    def worth(self, block: int, now_ms: int) -> float:
        used, stop, session = self.blocks[block]
        if not isinstance(self.policy, Reuse):
            return float(used)
        passed = np.array([self.latest.get(session, 0) > used])
        ages = np.array([max(1, now_ms - used)], np.float64)
        return float(self.policy.values(np.array([stop]), ages, passed)[0])


def plain_hits(stream: Stream, asked: Asked, capacity: int, policy: Policy) -> float:
    """The part of the blocks asked for that a store of single blocks holds, with those sessions."""
    store, hits = Plain(capacity, policy), 0
    parent = dict(enumerate(stream.parent.tolist()))
    matches = np.flatnonzero(asked.record.rows["kind"] == Kind.MATCH)
    for ms, number, ended in stream.moments():
        chain, session = stream.chain(number).tolist(), int(asked.session[matches[number]])
        if ended:
            stop = STOPS.get(stream.stop[number], 0)
            store.end(chain, ms, stop, session, parent)
        else:
            hits += store.match(chain, ms, session)
    return hits / len(stream.blocks)


def rate_of(asked: Asked, stream: Stream, part: float, policy: str) -> float:
    """What is predicted of *part* of all blocks."""
    capacity = max(1, round(part * stream.unique_blocks)) * BLOCK_BYTES
    held = simulate(asked, capacity, policy_of(policy))
    return asked.hits(held, len(stream.blocks) * MHA.block_tokens)


@pytest.mark.parametrize("policy", ["lru", "reuse"])
def test_all_uses_give_what_a_store_of_single_blocks_does(tmp_path: Path, policy: str) -> None:
    write_agents(tmp_path, sessions=10, turns=8)
    stream = make_stream(read_traces([tmp_path]), window_s=60, seed=1)
    record = recorded(stream, tmp_path / "record")
    assert record.level == 0
    asked = asked_of(within_bounds(record))
    assert asked.footprint_bytes == stream.unique_blocks * BLOCK_BYTES
    rates = []
    for part in PARTS:
        capacity = max(1, round(part * stream.unique_blocks))
        rates.append(rate_of(asked, stream, part, policy))
        expected = plain_hits(stream, asked, capacity, policy_of(policy))
        assert rates[-1] == pytest.approx(expected, abs=1e-9)
    assert rates[0] < rates[2] < rates[-1]
    ceiling = asked.hits(asked.before, len(stream.blocks) * MHA.block_tokens)
    assert ceiling == pytest.approx(float(bounds.ceiling(stream).sum()) / len(stream.blocks))


@pytest.mark.parametrize("policy", ["lru", "reuse"])
def test_a_sample_gives_it_within_two_points(tmp_path: Path, policy: str) -> None:
    write_agents(tmp_path, sessions=150, turns=40, seed=3)
    stream = make_stream(read_traces([tmp_path]), window_s=3600, seed=1)
    record = recorded(stream, tmp_path / "record", size=1 << 20)
    assert record.level >= 2, "the bound was reached"
    whole, small = (
        asked_of(within_bounds(each))
        for each in (recorded(stream, tmp_path / "whole", size=1 << 28), record)
    )
    for part in PARTS:
        steep = part in {0.02, 0.25}
        assert rate_of(small, stream, part, policy) == pytest.approx(
            rate_of(whole, stream, part, policy), abs=0.05 if steep else 0.02
        )
    assert small.footprint_bytes == pytest.approx(stream.unique_blocks * BLOCK_BYTES, rel=0.1)


@needs_traces
def test_of_the_public_traces_a_sixteenth_is_enough(tmp_path: Path) -> None:
    stream = make_stream(read_traces([agents()]), window_s=3600, seed=1)
    record = recorded(stream, tmp_path / "record", size=4 << 20)
    assert record.level >= 2
    small = asked_of(within_bounds(record))
    whole = asked_of(recorded(stream, tmp_path / "whole"))
    for part in (0.01, 0.05, 0.25):
        assert rate_of(small, stream, part, "reuse") == pytest.approx(
            rate_of(whole, stream, part, "reuse"), abs=0.02
        )


def test_a_block_that_all_begin_with_does_not_tip_the_estimate(tmp_path: Path) -> None:
    clock = Clock()
    record = Recorder(tmp_path / "record", RecordSettings(bytes=1 << 15), clock, SECRET)
    begin, rounds = names_of(0, 1, "all"), 3000
    for number in range(rounds):  # half of what is asked for is one block, held but at first
        clock.now_ms += 1000
        match(record, begin + names_of(number, number + 1))
        record.flush(0)
    group = read_record(tmp_path / "record")
    assert group.level >= 2
    asked = asked_of(group)
    for policy in ("lru", "reuse"):
        held = simulate(asked, 1 << 40, policy_of(policy))
        rate = asked.hits(held, 2 * rounds * MHA.block_tokens)
        assert rate == pytest.approx(0.5, abs=0.05)


def test_what_is_in_flight_takes_no_room(tmp_path: Path) -> None:
    """Two chains that together have no room: a hit if the second is put after the next match."""
    first, second = names_of(0, 8, "a"), names_of(0, 8, "b")
    found = []
    for late in (False, True):
        clock = Clock()
        record = Recorder(tmp_path / f"{late}", RecordSettings(), clock, SECRET)
        for chain in (first, second, first):
            clock.now_ms += 1
            match(record, chain)
            if not late or chain is first:
                record.note(Kind.PUT, MODEL, MHA, chain, tenant=0, retention=1)
        clock.now_ms += 60_000
        record.note(Kind.PUT, MODEL, MHA, second, tenant=0, retention=1)
        record.flush(0)
        asked = asked_of(read_record(tmp_path / f"{late}"))
        held = simulate(asked, 8 * BLOCK_BYTES, policy_of("lru"))
        found.append(held.sum())
    assert found == [0, 8]


def test_other_models_take_their_own_bytes_and_pieces_go_with_what_is_before(
    tmp_path: Path,
) -> None:
    """A put of a chain's end alone enters where its beginning is held, and nowhere else."""
    clock = Clock()
    record = Recorder(tmp_path / "record", RecordSettings(), clock, SECRET)
    chain = names_of(0, 8)
    for part, start in ((chain[: 4 * 16], 0), (chain[4 * 16 :], 4), (names_of(20, 24), 20)):
        record.note(Kind.PUT, MODEL, MHA, part, tenant=0, retention=1, start=start)
        clock.now_ms += 10_000
    match(record, chain, start=2)
    record.note(Kind.MATCH, ModelId(2), SHARDED, names_of(0, 3, "s"), tenant=0, retention=1)
    record.flush(0)
    asked = asked_of(read_record(tmp_path / "record"))
    whole = asked.footprint_bytes
    assert whole == (8 + 4 + 0) * BLOCK_BYTES + 3 * units_of(SHARDED) * 4096
    for capacity, hits in ((whole, 6), (8 * BLOCK_BYTES, 2), (7 * BLOCK_BYTES, 1)):
        assert simulate(asked, capacity, policy_of("lru")).sum() == hits


def test_what_was_held_before_the_record_began_is_no_miss_of_what_there_is(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "record", RecordSettings(), Clock(), SECRET)
    match(record, names_of(0, 10), stop=8)
    record.flush(0)
    now = Live(total_bytes=1 << 20, used_bytes=1 << 19)
    told = advise(read_record(tmp_path / "record"), now, Wishes((1 << 18,)))
    rates = {each["bytes"]: each["hit_rate"] for each in told["curve"]}
    assert told["hit_rate"] == told["predicted_hit_rate"] == rates[1 << 20] == 0.8
    assert rates[1 << 18] == 0.0


def test_flash_life_follows_what_is_missed(tmp_path: Path) -> None:
    clock = Clock()
    record = Recorder(tmp_path / "record", RecordSettings(days=30), clock, SECRET)
    for turn in range(11):  # two chains of 8 blocks by turns, and one that never comes back
        match(record, names_of(0, 8, f"{turn % 2}."))
        match(record, names_of(0, 8, f"once{turn}."))
        clock.now_ms += 86_400_000
        record.flush(turn * (1 << 30))
    now = Live(total_bytes=100 * BLOCK_BYTES, used_bytes=50 * BLOCK_BYTES)
    wishes = Wishes((4 * BLOCK_BYTES,), tbw_bytes=3650 << 30)
    told = advise(read_record(tmp_path / "record"), now, wishes)
    assert told["span_days"] == pytest.approx(11)
    assert told["writes"]["bytes_per_day"] == pytest.approx((10 << 30) / 11)
    assert told["writes"]["life_years"] == pytest.approx(3650 * 1.1 / 365.25)
    small = told["curve"][0]
    assert (small["hit_rate"], told["predicted_hit_rate"]) == pytest.approx((0, 72 / 176))
    assert small["written_bytes_per_day"] == pytest.approx((10 << 30) / 11 * 176 / 104)
    by_drive = advise(read_record(tmp_path / "record"), now, Wishes(dwpd=1.0, warranty_years=5))
    years = 100 * BLOCK_BYTES * 365.25 * 5 / ((10 << 30) / 11) / 365.25
    assert by_drive["writes"]["life_years"] == pytest.approx(years, rel=1e-6)


def test_what_live_sessions_need(tmp_path: Path) -> None:
    clock = Clock()
    record = Recorder(tmp_path / "record", RecordSettings(), clock, SECRET)
    for turn in range(60):  # three sessions that share 10 blocks and grow by one a turn
        for session in range(3):
            clock.now_ms += 10_000
            chain = names_of(0, 10, "shared") + names_of(0, 30 + turn, f"{session}.")
            match(record, chain)
    record.flush(0)
    group = read_record(tmp_path / "record")
    found = asked_of(group)
    told = live_sessions(found, 120_000)
    assert told["sessions"] == pytest.approx(3)
    assert told["chain_bytes"] / BLOCK_BYTES == pytest.approx(71.5, rel=0.02)
    assert told["needed_bytes"] / BLOCK_BYTES == pytest.approx(71.5 - 20 / 3, rel=0.02)
    assert live_sessions(found, 5_000)["sessions"] == pytest.approx(1)


@pytest.fixture
def stamped(scratch: Path) -> Iterator[Any]:
    """Prompts of 12 blocks that differ in their second one, and sessions that part late."""
    with open_warehouse(scratch, (32 << 20,)) as warehouse:
        model = warehouse.open_model("stamped", MHA)
        for number in range(20):
            chain = model.chain()
            chain.extend(tokens_of(1, 0))
            chain.extend([60_000 + number] * 16)
            names = chain.extend(tokens_of(10 + number % 2, 0)).names()
            assert put(warehouse, model, names).held == len(names)
        other = warehouse.open_model("sharded", SHARDED)
        for seed in range(6):
            put_whole(warehouse, other, chain_of(other, 9, seed, fork=8))
        yield warehouse


def test_prompts_that_differ_early_are_found(stamped: Any) -> None:
    first, second = partings(stamped._core)
    assert (first.model, first.position, first.until, first.fan_out) == ("stamped", 16, 32, 20)
    assert (first.common_tokens, first.behind_tokens) == (11 * 16, 20 * 11 * 16 + 10 * 16)
    assert first.lost_tokens == 19 * 11 * 16
    assert first.lost_bytes == 19 * 11 * BLOCK_BYTES
    assert (second.model, second.position, second.fan_out) == ("sharded", 8 * 16, 6)
    assert second.lost_bytes == 5 * 2 * BLOCK_BYTES
    assert partings(stamped._core, 1) == [first]


def test_what_several_sessions_share_is_not_lost(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        for seed in range(1, 8):
            put(warehouse, model, chain_of(model, 6, seed))
        assert [each.after for each in partings(warehouse._core)] == [""]
        for seed in range(1, 8):  # each of them goes on in two ways
            chain = model.chain().extend(tokens_of(6, seed))
            names = chain.extend(tokens_of(2, 90 + seed)).names()
            put(warehouse, model, names)
            chain = model.chain().extend(tokens_of(6, seed))
            put(warehouse, model, chain.extend(tokens_of(2, 190 + seed)).names())
        assert partings(warehouse._core) == []


def test_partings_of_a_large_tree_as_counted_one_by_one(scratch: Path) -> None:
    with open_warehouse(scratch, (64 << 20,)) as warehouse:
        model = warehouse.open_model("m", MHA)
        drawn = np.random.default_rng(1)
        for number in range(60):
            fork = int(drawn.integers(0, 8))
            put(warehouse, model, chain_of(model, 8 + int(drawn.integers(1, 9)), number, fork=fork))
        put(warehouse, model, chain_of(model, 9, 99).slice(4, 9))  # detached: it is nowhere
        slots = warehouse._core.slots
        children: dict[int, list[int]] = {}
        for slot in range(len(slots)):
            if slots.state[slot] == 2 and not slots.detached[slot]:
                above = int(slots.parent[slot])
                if above != 0xFFFFFFFF or int(slots.position[slot]) == 16:
                    children.setdefault(above, []).append(slot)

        def height(slot: int) -> int:
            return 1 + max((height(child) for child in children.get(slot, [])), default=0)

        expected = {}
        for above, below in children.items():
            alone = sorted(height(slot) for slot in below if slots.links[slot] <= 1)
            if len(alone) >= 4:
                after = "" if above == 0xFFFFFFFF else slots.key[above].tobytes()[4:20].hex()
                common = alone[int(0.1 * len(alone))]
                expected[after] = (len(alone), common * 16, (len(alone) - 1) * common * 16)
        found = {
            each.after: (each.fan_out, each.common_tokens, each.lost_tokens)
            for each in partings(warehouse._core)
        }
        assert found == expected
        assert len(found) > 3


def test_the_command_asks_the_daemon_and_reads_its_record(scratch: Path) -> None:
    made = made_warehouse(scratch / "tw")
    assert_refused(twfs("advise", made), InvalidInput.exit_code)
    with running_daemon(made) as _, connect(made / "socket") as store:
        model = store.open_model("m", MHA)
        for seed in (1, 2, 3, 4, 5):
            names = chain_of(model, 6, seed)
            for _ in range(2):
                with store.match(model, names) as found:
                    if found.blocks < 6:
                        assert store.put(model, names, payloads_of(MHA, names)).held == 6
        told = document("advise", made, "--capacity", "16K", "--dwpd", "1")
        prompts = document("advise", made, "--prompts")
        shown = twfs("advise", made, "--tbw", "1T", "--plot", scratch / "plots" / "curve.png")
        written = twfs("advise", made, "--prompts").stdout
    assert (told["requests"], told["asked_tokens"], told["held_tokens"]) == (10, 960, 480)
    assert told["hit_rate"] == told["predicted_hit_rate"] == told["ceiling"] == 0.5
    assert told["hit_rate_since_open"] == 0.5
    assert told["curve"][0]["bytes"] == 16384
    assert told["curve"][0]["hit_rate"] == pytest.approx(10 / 60)
    assert told["footprint_bytes"] == 30 * BLOCK_BYTES
    assert [(each["name"], each["held_bytes"]) for each in told["tenants"]] == [
        ("everybody", 30 * BLOCK_BYTES)
    ]
    assert [(each["name"], each["held_tokens"]) for each in told["classes"]] == [("standard", 480)]
    assert told["models"][0]["token_bytes"] == BLOCK_BYTES / 16
    assert told["writes"]["life_years"] > 0
    assert shown.returncode == 0, shown.stderr
    assert "50.00 %" in shown.stdout
    assert "the drives last" in shown.stdout
    assert (scratch / "plots" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert [(each["fan_out"], each["common_tokens"]) for each in prompts] == [(5, 96)]
    assert "5 prompts of m have nothing in common from their first 16 tokens on" in written
    told = document("advise", made)
    assert told["requests"] == 10, "the record is there without the daemon too"


def test_a_replay_compares_what_its_record_predicts(scratch: Path, tmp_path: Path) -> None:
    write_agents(tmp_path, sessions=8, turns=12)
    told = document(
        "replay", tmp_path, "--window", "10m", "--policy", "lru", "--capacity", "20%",
        "--policy", "reuse", "--capacity", "60%",
        "--advise", "20%", "--advise", "60%", "--advise", "40%", "--directory", scratch,
    )  # fmt: skip
    runs = [each for each in told["runs"] if each["replayed"]]
    assert len(runs) == 4
    for run in runs:
        assert run["findings"] == []
        assert [round(each["capacity_part"], 1) for each in run["advised"]] == [0.2, 0.6, 0.4]
        for each in run["advised"]:
            assert each["policy"] == run["policy"]
        *both, between = run["advised"]
        assert between["off_by"] is None, "no run had that capacity"
        for each in both:
            assert abs(each["off_by"]) < 0.02
            assert each["replayed_hit_rate"] > 0.5


def test_the_record_of_a_killed_daemon_goes_on(scratch: Path) -> None:
    made = made_warehouse(scratch / "tw")
    with running_daemon(made) as pid:
        store = connect(made / "socket")
        names = chain_of(store.open_model("m", MHA), 6)
        assert store.match(store.open_model("m"), names).blocks == 0
        store.operate("record")  # as the daemon does by itself after some seconds
        store.match(store.open_model("m"), names)
        os.kill(pid, signal.SIGKILL)
        store.close()
    [path] = segments_in(made / "record")
    with path.open("ab") as file:
        file.write(path.read_bytes()[:70])  # the beginning of a group that was torn
    with running_daemon(made), connect(made / "socket") as store:
        store.match(store.open_model("m"), names)
        told = document("advise", made)
    assert (told["requests"], told["asked_tokens"]) == (2, 2 * 96)
    assert told["ceiling"] == 0.5
