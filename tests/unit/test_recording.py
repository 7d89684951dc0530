"""The access record: bounded, without names or ids, kept over restarts; what is torn is dropped."""

import stat
from pathlib import Path

import numpy as np
import pytest
import xxhash

from support.recording import MODEL, Clock, match, names_of, recorder
from support.warehouses import MHA, chain_of, make_warehouse, open_warehouse, put
from twfs.config import Config, RecordSettings, parse
from twfs.errors import InvalidInput
from twfs.hints import Hint, Stop
from twfs.policy.accesses import (
    AGAIN_MS,
    HEAD,
    PUT_NOW,
    PUT_SOON,
    ROW_DTYPE,
    SAMPLE_DTYPE,
    USED_NOW,
    Kind,
    groups_in,
    last_id,
    merged,
    read_record,
    read_segment,
    segments_in,
)
from twfs.policy.asking import asked_of
from twfs.policy.recording import ENDS_MAX, PENDING_ROWS_MAX, Recorder, units_of
from twfs.units import Millis
from twfs.warehouse import Warehouse


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_what_was_noted_is_read_back_and_says_no_name(tmp_path: Path) -> None:
    clock = Clock()
    record = recorder(tmp_path / "record", clock)
    hashes = names_of(0, 10)
    match(record, hashes, start=2, stop=7, tenant=3)
    clock.now_ms += 5
    record.note(Kind.TOUCH, MODEL, MHA, names_of(0, 4), tenant=3, retention=2)
    record.note(Kind.PUT, MODEL, MHA, names_of(20, 22), tenant=3, retention=0, start=20)
    record.flush(12345)
    [path] = segments_in(tmp_path / "record")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    data = path.read_bytes()
    for at in range(0, len(hashes), 8):
        assert hashes[at : at + 8] not in data
    found = read_record(tmp_path / "record")
    columns = ["kind", "tenant", "retention", "start", "stop", "count", "samples", "tokens"]
    assert [tuple(row) for row in found.rows[columns].tolist()] == [
        (Kind.MATCH, 3, 1, 2, 7, 10, 10, 16),
        (Kind.TOUCH, 3, 2, 0, 0, 4, 4, 16),
        (Kind.PUT, 3, 0, 20, 0, 22, 2, 16),
    ]
    assert found.rows["units"].tolist() == [units_of(MHA)] * 3 == [2] * 3
    assert found.samples["index"].tolist() == [*range(10), *range(4), 20, 21]
    assert found.samples["id"][:4].tolist() == found.samples["id"][10:14].tolist()
    assert len(set(found.samples["id"].tolist())) == 12
    assert (found.written_bytes, found.last_ms - found.first_ms) == (12345, 5)
    other = Recorder(tmp_path / "other", RecordSettings(), clock, b"another")
    match(other, hashes)
    other.flush(0)
    assert not set(read_record(tmp_path / "other").samples["id"]) & set(found.samples["id"])


def test_puts_and_touches_of_what_was_matched_are_noted_once(tmp_path: Path) -> None:
    record = recorder(tmp_path / "record", Clock())
    chain = names_of(0, 8)
    match(record, chain)
    record.note(Kind.PUT, MODEL, MHA, chain[16 * 5 :], tenant=0, retention=1, start=5)
    record.note(Kind.TOUCH, MODEL, MHA, chain, tenant=0, retention=1)
    longer = names_of(0, 9)
    record.note(Kind.PUT, MODEL, MHA, longer[16 * 8 :], tenant=0, retention=1, start=8)
    record.note(Kind.TOUCH, MODEL, MHA, longer, tenant=0, retention=1)
    match(record, chain)
    record.flush(0)
    found = read_record(tmp_path / "record")
    assert found.rows["kind"].tolist() == [Kind.MATCH, Kind.PUT, Kind.MATCH]
    for number in range(ENDS_MAX + 1):
        match(record, names_of(0, 1, f"{number}."))
    assert len(record._ends) == ENDS_MAX


def test_how_a_request_ended_is_a_row_with_the_least_block_of_its_chain(tmp_path: Path) -> None:
    clock = Clock()
    record = recorder(tmp_path / "record", clock)
    chain = names_of(0, 8)
    match(record, chain)
    for later_ms in (AGAIN_MS - 1, 1, 1, AGAIN_MS):
        clock.now_ms += later_ms
        record.note(Kind.TOUCH, MODEL, MHA, chain, tenant=0, retention=1)
    record.flush(0)
    found = read_record(tmp_path / "record")
    assert found.rows["kind"].tolist() == [Kind.MATCH, Kind.END, Kind.END]
    assert np.diff(found.rows["time_ms"].astype(np.int64)).tolist() == [AGAIN_MS, AGAIN_MS + 1]
    assert found.rows["start"].tolist() == [0, AGAIN_MS, 2 * AGAIN_MS + 1]
    assert found.rows["stop"].tolist() == [0, USED_NOW, USED_NOW]
    assert found.rows["samples"].tolist() == [8, 1, 1]
    assert found.samples["id"][8] == found.samples["id"][9] == found.samples["id"][:8].min()


def test_ends_say_when_it_was_put_and_why_it_stopped_and_stay_as_long_as_matches(
    tmp_path: Path,
) -> None:
    clock = Clock()
    record = recorder(tmp_path / "record", clock)

    def note(kind: Kind, chain: bytes, stop: Stop | None = None) -> None:
        code = 0 if stop is None else stop.code
        record.note(kind, MODEL, MHA, chain, tenant=0, retention=1, stop=code)

    late, soon, told = (names_of(0, 8, each) for each in ("late", "soon", "told"))
    for chain in (late, soon, told):
        match(record, chain)
    note(Kind.PUT, soon)
    note(Kind.PUT, told, Stop.TOOL_USE)
    note(Kind.TOUCH, told, Stop.TOOL_USE)
    note(Kind.TOUCH, told, Stop.TOOL_USE)
    clock.now_ms += 5000
    note(Kind.PUT, late, Stop.END_TURN)
    clock.now_ms += 3
    note(Kind.TOUCH, late, Stop.END_TURN)
    note(Kind.TOUCH, soon)
    record.flush(0)
    found = read_record(tmp_path / "record")
    ends = found.rows[found.rows["kind"] == Kind.END]
    assert [tuple(row) for row in ends[["start", "stop", "count"]].tolist()] == [
        (0, PUT_NOW | USED_NOW | PUT_SOON | Stop.TOOL_USE.code, 8),
        (5003, PUT_NOW | USED_NOW | Stop.END_TURN.code, 8),
        (5003, USED_NOW | PUT_SOON, 8),
    ]
    asked = asked_of(found)
    assert asked.of_match.tolist() == [-1, -1, -1, 2, 0, 1]
    assert asked.session[3:].tolist() == asked.session[[2, 0, 1]].tolist()
    for level in range(1, 8):
        thin = found.thinned(level)
        kinds = thin.rows["kind"].tolist()
        assert kinds.count(Kind.MATCH) == kinds.count(Kind.END)
        assert (asked_of(thin).of_match >= 0).sum() == kinds.count(Kind.END)


def test_a_full_record_keeps_fewer_blocks_and_all_uses_of_these(tmp_path: Path) -> None:
    clock, size = Clock(), 1 << 16
    record = recorder(tmp_path / "record", clock, size=size)
    chains = [names_of(0, 200, f"{number}.") for number in range(40)]
    for number in range(400):
        clock.now_ms += 1000
        match(record, chains[number % 40], stop=150)
        if number % 8 == 7:
            record.flush(0)
            assert on_disk(tmp_path / "record") <= size
            assert record.failure == ""
    found = read_record(tmp_path / "record")
    assert record.rate == 2.0**-found.level < 1 / 8
    assert (found.samples["id"] <= np.uint64(last_id(found.level))).all()
    uses = np.unique(found.samples["id"], return_counts=True)[1]
    assert set(uses.tolist()) == {10}, "each of 40 chains came 10 times"
    expected = 40 * 200 * record.rate
    assert expected / 2 < len(uses) < expected * 2
    matched = found.rows["kind"] == Kind.MATCH
    asked = int((found.rows["count"] - found.rows["start"])[matched].sum())
    assert asked + int(found.totals["asked"].sum()) == 400 * 200, "sums are exact all the same"
    held = int(found.rows["stop"].sum()) + int(found.totals["held"].sum())
    assert held == 400 * 150
    assert len(found.rows) + int(found.totals["requests"].sum()) == 400


def test_what_is_older_than_it_has_to_be_goes_and_then_more_is_kept_again(tmp_path: Path) -> None:
    clock, size = Clock(), 1 << 16
    record = recorder(tmp_path / "record", clock, size=size, days=1)
    for number in range(100):
        match(record, names_of(0, 200, f"{number}."))
        record.flush(0)
    coarse = record.rate
    assert coarse < 1
    first = segments_in(tmp_path / "record")[0]
    for number in range(20):
        clock.now_ms += 4 * 3_600_000
        match(record, names_of(0, 50, f"late{number}."))
        record.flush(0)
    assert not first.exists()
    assert record.rate > coarse
    found = read_record(tmp_path / "record")
    assert clock.now_ms - found.first_ms <= 3 * 86_400_000
    assert on_disk(tmp_path / "record") <= size


def test_the_record_goes_on_after_a_restart_and_drops_a_torn_tail(tmp_path: Path) -> None:
    clock, directory = Clock(), tmp_path / "record"
    record = recorder(directory, clock)
    for number in range(3):
        match(record, names_of(0, 5, f"{number}."))
        record.flush(0)
    [path] = segments_in(directory)
    whole = path.read_bytes()
    ends = [end for _, end in groups_in(whole)]
    assert (len(ends), ends[-1]) == (3, len(whole))
    for cut in (ends[1] + 1, ends[1] + HEAD.size, ends[2] - 1):
        path.write_bytes(whole[:cut])
        assert len(read_record(directory).rows) == 2
        again = recorder(directory, clock)
        assert path.stat().st_size == ends[1]
        match(again, names_of(0, 5, "new"))
        again.flush(0)
        assert len(read_record(directory).rows) == 3
    for at in (4, ends[0] + HEAD.size + 3, ends[1] - 1):  # a flipped bit ends it there
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert len(read_segment(path)[0]) == (0 if at < ends[0] else 1)
    path.write_bytes(b"no record at all" * 100)
    again = recorder(directory, clock)
    assert not path.exists()
    with pytest.raises(InvalidInput, match="no access record"):
        read_record(directory)
    match(again, names_of(0, 5))
    again.flush(0)
    assert len(read_record(directory).rows) == 1


def test_a_lying_head_is_no_group(tmp_path: Path) -> None:
    record = recorder(tmp_path / "record", Clock())
    match(record, names_of(0, 5))
    record.flush(0)
    [path] = segments_in(tmp_path / "record")
    data = path.read_bytes()
    for at in (8, 12, 16, 20, 24):  # size, level, and how many of what
        for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            if data[at : at + 4] == value.to_bytes(4, "little"):
                continue
            lying = data[:at] + value.to_bytes(4, "little") + data[at + 4 : -16]
            assert not list(groups_in(lying + xxhash.xxh3_128_digest(lying))) or at == 12


def test_thinning_twice_is_thinning_once(tmp_path: Path) -> None:
    record = recorder(tmp_path / "record", Clock())
    for number in range(30):
        match(record, names_of(0, 100, f"{number % 7}."), start=number, stop=number + 20)
    record.flush(0)
    found = read_record(tmp_path / "record")
    once, twice = found.thinned(4), found.thinned(2).thinned(4)
    assert (once.rows == twice.rows).all()
    assert (once.samples == twice.samples).all()
    assert sorted(once.totals.tolist()) == sorted(twice.totals.tolist())
    both = merged([found.thinned(1), found.thinned(4)])
    assert (both.level, len(both.rows)) == (4, 2 * len(once.rows))
    assert merged([]).rows.dtype == ROW_DTYPE
    assert merged([]).samples.dtype == SAMPLE_DTYPE


def test_more_than_memory_may_hold_is_lost_and_counted(tmp_path: Path) -> None:
    record = recorder(tmp_path / "record", Clock())
    one = names_of(0, 1)
    for _ in range(PENDING_ROWS_MAX + 5):
        match(record, one)
    record.flush(0)
    found = read_record(tmp_path / "record")
    assert (len(found.rows), found.lost) == (PENDING_ROWS_MAX, 5)


def test_a_disk_that_takes_nothing_is_told_and_stops_nobody(tmp_path: Path) -> None:
    directory = tmp_path / "record"
    directory.write_text("a file, where the directory should be")
    record = recorder(directory, Clock())
    match(record, names_of(0, 5))
    record.flush(0)
    assert str(directory) in record.failure
    directory.unlink()
    match(record, names_of(0, 5))
    record.flush(0)
    assert record.failure == ""


def test_it_can_be_off_and_its_settings_are_checked(scratch: Path) -> None:
    assert parse(b"[record]\non = false\n").record.on is False
    for text in ("bytes = 1000", "bytes = '4G'", "days = 0", "every = 2"):
        with pytest.raises(InvalidInput, match=r"twfs\.toml"):
            parse(f"[record]\n{text}\n".encode())
    config = Config(record=RecordSettings(on=False))
    with open_warehouse(scratch, config=config) as warehouse:
        model = warehouse.open_model("m", MHA)
        with warehouse.match(model, chain_of(model, 4)):
            pass
        assert warehouse.operate("record")["on"] is False
    assert not (scratch / "record").exists()


def test_the_warehouse_notes_matches_puts_and_touches(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        with warehouse.match(model, names) as found:
            assert found.blocks == 0
        assert put(warehouse, model, names).held == 6
        with warehouse.match(model, names, start=2) as found:
            assert found.blocks == 6
        other = chain_of(model, 3, 5)
        assert put(warehouse, model, other).held == 3
        warehouse.touch(model, other, Hint(session="a"))
        warehouse.touch(model, names.head(5))
        now = warehouse.operate("record")
        assert Path(now["record"]) == scratch / "record"
        assert (now["matched_blocks"], now["asked_blocks"]) == (4, 10)
        assert now["models"] == {"1": "m"}
        assert now["held"] == [[0, 1, 9 * 8192]]
        assert warehouse.statistics()["record"]["bytes"] > 0
    with Warehouse.open(scratch) as warehouse, warehouse.match(warehouse.open_model("m"), names):
        pass
    noted = read_record(scratch / "record")
    columns = ["kind", "start", "stop", "count", "samples"]
    assert [tuple(row) for row in noted.rows[columns].tolist()] == [
        (Kind.MATCH, 0, 0, 6, 6),
        (Kind.MATCH, 2, 6, 6, 6),
        (Kind.PUT, 0, 0, 3, 3),
        (Kind.TOUCH, 0, 0, 5, 5),
        (Kind.MATCH, 0, 6, 6, 6),
    ]
    assert noted.written_bytes == 9 * 8192


def test_a_touch_of_what_was_not_let_in_ends_its_match_and_is_no_use_of_its_own(
    scratch: Path,
) -> None:
    clock = Clock()
    make_warehouse(scratch)
    with Warehouse.open(scratch, clock=lambda: Millis(clock())) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        with warehouse.match(model, names):
            pass
        clock.now_ms += 5000
        warehouse.touch(model, names, Hint(stop=Stop.TOOL_USE))
        warehouse.touch(model, chain_of(model, 3, 5), Hint(stop=Stop.TOOL_USE))
        warehouse.operate("record")
    noted = read_record(scratch / "record")
    assert [tuple(row) for row in noted.rows[["kind", "start", "stop"]].tolist()] == [
        (Kind.MATCH, 0, 0),
        (Kind.END, 5000, USED_NOW | Stop.TOOL_USE.code),
    ]


def test_a_new_warehouse_has_no_record_of_the_one_before(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        with warehouse.match(model, chain_of(model, 4)):
            pass
    assert (scratch / "record").exists()
    make_warehouse(scratch, force=True)
    assert not (scratch / "record").exists()
