"""What is let in: names that were offered before, and no more bytes than the day's budget."""

from pathlib import Path

import pytest
import xxhash

from support.daemon import running_daemon
from support.warehouses import MHA, SHARDED, chain_of, open_warehouse, payload_of, put, put_whole
from twfs.config import CONFIG_FILE, AdmissionSettings, Config, parse
from twfs.errors import InvalidInput
from twfs.hints import Retention
from twfs.policy.admission import DAY_MS, Budget, Remembered
from twfs.store import PutOutcome
from twfs.units import Millis

BLOCK = 8192


class Time:
    """A clock that is set."""

    def __init__(self, now_ms: int = 1_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> Millis:
        return Millis(self.now_ms)


def twice(**more: int) -> Config:
    return Config(admission=AdmissionSettings(second_touch=(Retention.STANDARD,), **more))


def test_a_block_is_kept_when_it_is_offered_again(scratch: Path) -> None:
    with open_warehouse(scratch, config=twice()) as warehouse:
        model = warehouse.open_model("m", MHA)
        short, whole = chain_of(model, 4), chain_of(model, 7)
        first = put(warehouse, model, short)
        assert set(first.outcomes) == {PutOutcome.NOT_ADMITTED}
        assert (first.held, first.written_bytes) == (0, 0)
        second = put(warehouse, model, whole)
        assert second.outcomes == (PutOutcome.PUBLISHED,) * 4 + (PutOutcome.NOT_ADMITTED,) * 3
        assert put(warehouse, model, whole).held == 7
        counters = warehouse.statistics()["counters"]
        assert (counters["first_touch_blocks"], counters["published_blocks"]) == (7, 7)
        assert warehouse.statistics()["admission"]["second_touch"] == ["standard"]


def test_a_client_is_told_what_was_not_admitted_and_it_is_a_miss(scratch: Path) -> None:
    with running_daemon(scratch) as daemon:
        (scratch / CONFIG_FILE).write_text('[admission]\nsecond_touch = ["standard"]\n')
        daemon.restart()
        with daemon.client() as client:
            model = client.open_model("m", MHA)
            names = chain_of(model, 7)
            payloads = [payload_of(MHA, names.hash_at(index)) for index in range(7)]
            first = client.put(model, names.head(4), payloads[:4])
            assert first.outcomes == (PutOutcome.NOT_ADMITTED,) * 4
            assert (first.held, first.written_bytes) == (0, 0)
            assert client.lookup(model, names) == 0
            second = client.put(model, names, payloads)
            assert second.outcomes == (PutOutcome.PUBLISHED,) * 4 + (PutOutcome.NOT_ADMITTED,) * 3
            assert (second.held, second.written_bytes) == (4, 4 * BLOCK)
            with client.match(model, names) as match:
                assert match.blocks == 4
            counters = client.statistics()["counters"]
            assert (counters["first_touch_blocks"], counters["failed_blocks"]) == (7, 0)


def test_what_is_below_a_refused_block_is_refused(scratch: Path) -> None:
    with open_warehouse(scratch, config=twice()) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names.slice(3, 6))  # the tail alone is remembered
        assert put(warehouse, model, names).outcomes == (PutOutcome.NOT_ADMITTED,) * 6
        assert put(warehouse, model, names).held == 6


@pytest.mark.parametrize("retention", [Retention.DURABLE, Retention.EPHEMERAL])
def test_classes_that_are_not_named_are_let_in_at_once(scratch: Path, retention: Retention) -> None:
    with open_warehouse(scratch, config=twice()) as warehouse:
        model = warehouse.open_model("m", MHA)
        assert put(warehouse, model, chain_of(model, 3), retention=retention).held == 3


def test_shards_of_a_name_are_offered_each_for_itself(scratch: Path) -> None:
    with open_warehouse(scratch, config=twice()) as warehouse:
        model = warehouse.open_model("m", SHARDED)
        names = chain_of(model, 3)
        for shard in range(2):
            assert put(warehouse, model, names, shard=shard).held == 0
        put_whole(warehouse, model, names)
        assert warehouse.lookup(model, names) == 3


def test_names_are_remembered_for_so_many_others() -> None:
    remembered = Remembered(4096)
    names = [xxhash.xxh3_128_digest(b"%d" % number) for number in range(20_000)]
    assert not any(remembered.asked(b"".join(names[:1000]), 1))
    assert all(remembered.asked(b"".join(names[:1000]), 1))
    assert sum(remembered.asked(b"".join(names[:1000]), 2)) < 10, "another shard"
    wrong = sum(sum(remembered.asked(name, 1)) for name in names[1000:15_000])
    assert wrong < 14_000 / 100
    assert sum(remembered.asked(b"".join(names[:1000]), 1)) < 50, "forgotten after its turn"
    assert remembered.nbytes <= 4096 * 32


def test_a_budget_is_spent_evenly() -> None:
    clock = Time()
    budget = Budget(24_000, clock)
    assert budget.level() == 1000, "an hour's at once"
    budget.spend(1000)
    assert budget.level() == 0
    clock.now_ms += DAY_MS // 48
    assert budget.level() == pytest.approx(500)
    clock.now_ms -= DAY_MS  # set back
    assert budget.level() == pytest.approx(500)
    clock.now_ms += 3 * DAY_MS
    assert budget.level() == 1000
    budget.spend(1500)  # what is promised is let in all the same
    assert budget.level() == -500
    budget.spend(-2500)
    assert budget.level() == 1000


def test_writes_of_a_day_stay_within_the_budget(scratch: Path) -> None:
    clock = Time()
    config = Config(admission=AdmissionSettings(bytes_per_day=48 * 10 * BLOCK))
    with open_warehouse(scratch, clock=clock, config=config) as warehouse:
        model = warehouse.open_model("m", MHA)
        for turn in range(96):  # offers five times as much
            result = put(warehouse, model, chain_of(model, 25, turn))
            first = result.outcomes.index(PutOutcome.NOT_ADMITTED)
            assert set(result.outcomes[:first]) <= {PutOutcome.PUBLISHED}
            assert set(result.outcomes[first:]) == {PutOutcome.NOT_ADMITTED}
            clock.now_ms += DAY_MS // 96
        counters = warehouse.statistics()["counters"]
        assert 470 * BLOCK <= counters["written_bytes"] <= (480 + 20) * BLOCK
        assert counters["worn_blocks"] == 96 * 25 - counters["published_blocks"]
        durable = put(warehouse, model, chain_of(model, 40, 999), retention=Retention.DURABLE)
        assert durable.held == 40, "what is promised is always let in"
        assert warehouse.statistics()["admission"]["budget_left_bytes"] < 0


def test_a_put_that_is_given_up_has_spent_nothing(scratch: Path) -> None:
    config = Config(admission=AdmissionSettings(drive_writes_per_day=24.0))
    with open_warehouse(scratch, clock=Time(), config=config) as warehouse:
        model = warehouse.open_model("m", MHA)
        before = warehouse.statistics()["admission"]
        assert before["budget_bytes_per_day"] == 24 * warehouse.space().total_bytes
        begun = warehouse.begin_put(
            model.id, chain_of(model, 9), group=0, shard=0, retention=Retention.STANDARD, owner=0
        )
        assert warehouse.statistics()["admission"] != before
        begun.abandon()
        assert warehouse.statistics()["admission"] == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[admission]\nsecond_touch = ["durable"]', "always let in"),
        ("[admission]\nbytes_per_day = 0", "bytes_per_day"),
        ("[admission]\ndrive_writes_per_day = -1.0", "drive_writes_per_day"),
        ('[eviction]\npolicy = "lfu"', "lfu"),
    ],
)
def test_settings_that_mean_nothing_are_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse(text.encode())


def test_the_lesser_budget_holds() -> None:
    settings = AdmissionSettings(bytes_per_day=1000, drive_writes_per_day=0.5)
    assert settings.budget_bytes_per_day(10_000) == 1000
    assert settings.budget_bytes_per_day(1000) == 500
    assert AdmissionSettings().budget_bytes_per_day(1000) is None
