"""Hints, classes and forgetting over the socket: the same as in the daemon's own process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.warehouses import MHA, chain_of, payloads_of
from twfs import Client, Hint, Retention, Stop
from twfs.config import Config
from twfs.errors import InvalidInput, NoSuchBlock
from twfs.prefix import Names
from twfs.store import Model
from twfs_mount.main import config_of, parser
from twfs_tools.process import daemon_command


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    with running_daemon(scratch / "w") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


def store(client: Client, model: Model, names: Names, hint: Hint) -> None:
    assert client.put(model, names, payloads_of(MHA, names), hint=hint).held == len(names)


def listed(client: Client, model: Model) -> dict[tuple[str, ...], Retention]:
    """The class of every head, by the ids of the sessions that end there."""
    return {info.ids: info.retention for info in client.sessions(model.id)}


def test_a_hint_makes_and_moves_a_session(client: Client) -> None:
    model = client.open_model("m", MHA)
    names = chain_of(model, 6)
    store(client, model, names.head(3), Hint("a", Retention.DURABLE, Stop.TOOL_USE, 50))
    assert listed(client, model) == {("a",): Retention.DURABLE}
    store(client, model, names, Hint("a", Retention.EPHEMERAL))
    assert listed(client, model) == {("a",): Retention.EPHEMERAL}
    chain = client.chain_of(model.id, names.hash_at(5))
    assert {info.block.retention for info in chain} == {Retention.EPHEMERAL.rank}


def test_a_session_is_retained_and_forgotten_by_its_id(client: Client) -> None:
    model = client.open_model("m", MHA)
    names, other = chain_of(model, 4), chain_of(model, 5, 1, fork=2)
    store(client, model, names, Hint("a"))
    store(client, model, other, Hint("b"))
    client.retain(model.id, "b", Retention.PINNED)
    assert listed(client, model) == {("a",): Retention.STANDARD, ("b",): Retention.PINNED}
    assert client.forget(model, "a") == 2 * 8192
    assert listed(client, model) == {("b",): Retention.PINNED}
    assert client.forget(model, "a") == 0
    with pytest.raises(NoSuchBlock):
        client.retain(model.id, "a", Retention.DURABLE)
    with pytest.raises(InvalidInput):
        client.forget(model, "")
    figures = client.statistics()["retention"]
    assert (figures["pinned"]["blocks"], figures["standard"]["blocks"]) == (5, 0)


def test_a_touch_over_the_socket_is_heard_within_a_second_or_so(client: Client) -> None:
    model = client.open_model("m", MHA)
    names = chain_of(model, 3)
    store(client, model, names, Hint())
    client.touch(model, names, Hint("a", Retention.DURABLE))
    while listed(client, model) != {("a",): Retention.DURABLE}:
        assert client.lookup(model, names) == 3


def test_the_settings_file_can_be_named(scratch: Path) -> None:
    command = daemon_command(scratch, config=scratch / "other.toml")
    given = parser().parse_args(command[3:])
    assert config_of(given).config == scratch / "other.toml"
    assert config_of(parser().parse_args([str(scratch)])).config is None
    assert Config().retention.pinned.ttl is None
