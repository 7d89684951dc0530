"""`twfs pin` and `twfs retain`: sessions by head and by id, with a daemon and without."""

from pathlib import Path

import pytest

from support.warehouses import MHA, chain_of, open_warehouse, put
from twfs import Hint, Retention
from twfs_tools.cli import run


def classes(directory: Path) -> dict[str, Retention]:
    """The class of every head, by its hash."""
    with open_warehouse(directory) as warehouse:
        model = warehouse.open_model("org--m")
        return {info.head.hex(): info.retention for info in warehouse.sessions(model.id)}


@pytest.fixture
def heads(scratch: Path) -> list[str]:
    """A warehouse with three sessions; the last has an id."""
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("org--m", MHA)
        names = [chain_of(model, 3, seed) for seed in (1, 2, 3)]
        for each, hint in zip(names, (Hint(), Hint(), Hint("agent/7")), strict=True):
            put(warehouse, model, each, hint=hint)
    return [each.hash_at(2).hex() for each in names]


def test_sessions_are_pinned_by_head_and_by_id(scratch: Path, heads: list[str]) -> None:
    assert run(["pin", str(scratch), f"org--m/{heads[0]}", "agent/7"]) == 0
    found = classes(scratch)
    assert [found[head] for head in heads] == [
        Retention.PINNED, Retention.STANDARD, Retention.PINNED,
    ]  # fmt: skip
    assert (
        run(["retain", str(scratch), "--class", "ephemeral", "agent/7", "--model", "org--m"]) == 0
    )
    assert classes(scratch)[heads[2]] is Retention.EPHEMERAL


def test_what_is_nowhere_is_said_and_what_was_done_before_stays(
    scratch: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["retain", str(scratch), "--class", "durable", f"org--m/{heads[1]}", "nobody"]) == 17
    said = capsys.readouterr()
    assert f"durable: org--m/{heads[1]}" in said.out
    assert "'nobody'" in said.err
    assert classes(scratch)[heads[1]] is Retention.DURABLE
    assert run(["retain", str(scratch), "--class", "durable", f"org--m/{'0' * 32}"]) == 17
    assert run(["pin", str(scratch), "agent/7", "--tenant", "acme"]) != 0


def test_a_pin_that_cannot_be_kept_is_refused_in_a_sentence(
    scratch: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "twfs.toml").write_text("[retention.pinned]\nshare = 0.0\n")
    assert run(["pin", str(scratch), "agent/7"]) == 35
    said = capsys.readouterr().err
    assert "cannot be pinned" in said
    assert "twfs.toml" in said
    assert set(classes(scratch).values()) == {Retention.STANDARD}
    assert len(heads) == 3


def test_json_names_what_was_done(
    scratch: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pin", str(scratch), f"org--m/{heads[0]}", "--json"]) == 0
    assert '"class": "pinned"' in capsys.readouterr().out
