"""Guaranteed: the engines' core never raises into an engine, and gives back right bytes or a miss.

A real daemon serves; scheduler and workers are attachments of their own, as in separate processes.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from support.coreengine import BLOCK_BYTES, BLOCK_TOKENS, Engine, keys_of, layout_of
from support.daemon import PATIENT_S, Daemon, running_daemon
from twfs.client import Client
from twfs.engines import attaching
from twfs.engines.attaching import Attachment
from twfs.engines.finding import NAMED_AT_ONCE, NAMED_SOON, Desk, Finder, names_in
from twfs.engines.requests import Params
from twfs.engines.transfers import Offer, Run, Transfers
from twfs.hints import Hint
from twfs.prefix import Names, joined
from twfs.store import ModelInfo

Payload = npt.NDArray[np.uint8]


def payloads_of(count: int, seed: int = 0) -> list[list[Payload]]:
    """Payloads in three pieces each, as an engine's layers are."""
    numbers = np.random.default_rng(seed)
    cuts = (0, 4096, 30_001, BLOCK_BYTES)
    whole = [numbers.integers(0, 256, BLOCK_BYTES, dtype=np.uint8) for _ in range(count)]
    return [[each[a:b].copy() for a, b in pairwise(cuts)] for each in whole]


def empty_like(payloads: list[list[Payload]]) -> list[list[Payload]]:
    return [[np.zeros_like(piece) for piece in pieces] for pieces in payloads]


def same(one: list[list[Payload]], other: list[list[Payload]]) -> bool:
    return all(
        np.array_equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def leases_of(client: Client) -> int:
    """How many leases the daemon has granted that are not over."""
    held: int = client.statistics()["leases"]["leases"]
    return held


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon") / "w") as running:
        yield running


@pytest.fixture
def engine(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on a model of this test's own."""
    name = "".join(c for c in request.node.name if c.isalnum())[:80]
    made = Engine(daemon, layout_of(model=name))
    yield made
    made.close()


def info_of(client: Client, engine: Engine) -> ModelInfo:
    """The engine's model, as an operator sees it."""
    return next(info for info in client.models() if info.name == engine.scheduler.name)


def test_what_one_engine_stores_another_loads_in_pieces_of_its_own_memory(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 6), payloads_of(6)
    engine.store(keys[:4], payloads[:4])
    engine.store(keys, payloads)
    other = Engine(daemon, engine.scheduler.layout)
    assert other.ask("r", [*keys, b"unknown" * 4]) == 6
    into = empty_like(payloads)
    done = other.load("r", 0, into)
    assert (done.store, done.blocks, done.payload_bytes) == (False, 6, 6 * BLOCK_BYTES)
    assert same(into, payloads)
    part = empty_like(payloads[2:5])
    assert other.load("r", 2, part).blocks == 3
    assert same(part, payloads[2:5])
    other.close()


def test_what_a_request_will_load_is_on_its_way_with_the_answer(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 6), payloads_of(6)
    engine.store(keys, payloads)
    attached = Attachment(daemon.socket, engine.scheduler.layout.model, engine.scheduler.layout)
    finder, worker = Finder(attached, BLOCK_TOKENS, ahead=True), Transfers(attached)
    while finder.ask("r", keys, 0) is None:
        time.sleep(0.001)
    match = finder.match("r")
    assert match is not None
    while not read_by(attached)["ios"]:  # nobody has asked for a byte yet
        time.sleep(0.001)
    into = empty_like(payloads)
    worker.load(1, match, into, first=0, timeout_s=PATIENT_S)
    worker.drain()
    assert worker.finished()[0].blocks == 6
    assert same(into, payloads)
    assert read_by(attached)["ahead"] == 6
    finder.finish("r", keys)
    worker.close()
    finder.close()
    attached.close()


def read_by(attached: Attachment) -> dict[str, int]:
    """What the attachment's host reader counts."""
    store = cast(Client, attached.store)
    found: dict[str, int] = store.statistics()["client"]["readers"].get("host", {"ios": 0})
    return found


def test_a_desk_does_what_is_urgent_first_and_all_before_it_closes() -> None:
    desk, done = Desk("test"), list[str]()
    desk.put(lambda: done.append("late"), later=True)
    desk.put(lambda: done.append("later still"), later=True)
    desk.put(lambda: done.append("urgent"))
    desk.close(PATIENT_S)
    assert done == ["urgent", "late", "later still"]
    waiting, came = Desk("test"), threading.Event()
    waiting.put(came.set, later=True)
    assert came.wait(PATIENT_S)  # with nothing else to do, and without an end
    waiting.close(PATIENT_S)


def test_keys_carry_their_parents_so_that_a_conversation_is_one_head(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 5), payloads_of(5)
    engine.store(keys[:2], payloads[:2])
    offer = engine.offer(keys, 2)
    engine.workers[0].store(9, offer, payloads[2:])
    engine.end(0, 9)
    with daemon.client() as client:
        info = info_of(client, engine)
        while info_of(client, engine).blocks < 5:
            time.sleep(0.001)
        (session,) = client.sessions(info.id)
        assert (session.blocks, session.tokens) == (5, 5 * BLOCK_TOKENS)
        assert client.detached(info.id) == []


def test_a_block_counts_once_every_shard_of_it_is_published(daemon: Daemon) -> None:
    engine = Engine(daemon, layout_of(shards=2))
    keys = keys_of("a", 3)
    engine.store(keys, payloads_of(3, seed=1), worker=0)
    assert engine.ask("before", keys) == 0
    engine.store(keys, payloads_of(3, seed=2), worker=1)
    assert engine.ask("after", keys) == 3
    for worker, seed in ((0, 1), (1, 2)):
        into = empty_like(payloads_of(3))
        assert engine.load("after", 0, into, worker).blocks == 3
        assert same(into, payloads_of(3, seed))
    engine.close()


def test_all_keys_of_a_request_are_one_message_and_repeated_asks_one_lease(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 40), payloads_of(40)
    engine.store(keys, payloads)
    with daemon.client() as client:
        before, leases = client.statistics(), leases_of(client)
        assert engine.ask("r", keys, start=4) == 40
        for start in (4, 5, 39):
            assert engine.finder.ask("r", keys, start) == 40
        assert engine.finder.ask("r", keys[:20], 4) == 20
        after = client.statistics()
        asked = after["server"]["requests"]["matchnames"]
        assert asked - before["server"]["requests"].get("matchnames", 0) == 1
        assert leases_of(client) == leases + 1
        engine.finder.finish("r", keys)
        while leases_of(client) != leases:
            time.sleep(0.001)


def test_keys_that_an_engine_took_back_are_not_found(daemon: Daemon, engine: Engine) -> None:
    """Its list is not copied; a session's user may go on otherwise than the model did."""
    first, then, touched = keys_of("a", 40), keys_of("b", 30), list[bool]()
    engine.store(first, payloads_of(40))
    keys = list(first)
    assert engine.ask("r", keys) == 40
    keys[10:] = then
    assert engine.ask("r", keys) == 10
    store, real = engine.scheduler.store, engine.scheduler.store.touch

    def touch(model: Any, names: Names, hint: Hint) -> None:
        touched.append(names.keys == tuple(keys))
        real(model, names, hint)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "touch", touch)
        keys[20:] = keys_of("c", 20)
        engine.finder.finish("r", keys)
        while not touched:
            time.sleep(0.001)
    assert touched == [True]


def test_keys_that_an_engine_takes_back_while_they_are_named_are_not_found(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, then = keys_of("a", 2 * NAMED_AT_ONCE), keys_of("b", 2 * NAMED_AT_ONCE)
    engine.store(first[:NAMED_AT_ONCE], payloads_of(NAMED_AT_ONCE))
    keys = list(first)

    def named(*arguments: Any, **more: Any) -> Names:
        keys[:] = then  # the user goes on otherwise, just now
        return names_in(*arguments, **more)

    monkeypatch.setattr("twfs.engines.finding.names_in", named)
    assert engine.ask("r", keys) == 0
    assert engine.ask("r", keys) == 0
    engine.finder.finish("r", keys)


def test_a_step_waits_only_for_an_answer_that_may_come_in_it(
    daemon: Daemon, engine: Engine
) -> None:
    waits = list[float | None]()

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    finder = Finder(engine.scheduler, BLOCK_TOKENS, answer_s=PATIENT_S)
    few, many = keys_of("few", NAMED_SOON), keys_of("many", NAMED_SOON + 1)
    for name in ("a", "b", "c"):
        finder.admit(name)
        finder._requests[name].answered = Event()
    while finder.epoch("a") is None:
        time.sleep(0.001)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert finder.ask("a", many, 0) is None
        assert finder.ask("b", few, 0) is None  # behind the other's
        assert waits == []
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    while finder.ask("a", many, 0) is None or finder.ask("b", few, 0) is None:
        time.sleep(0.001)
    waits.clear()
    while finder._desk.under_way():
        time.sleep(0.001)
    finder.next_step()
    assert finder.ask("c", few, 0) == 0
    assert waits == [PATIENT_S]
    finder.close()


def test_a_step_waits_for_what_was_asked_in_it_only_where_answers_come_in_time(
    daemon: Daemon, engine: Engine
) -> None:
    waits = list[str]()

    class Event(threading.Event):
        def __init__(self, request: str) -> None:
            super().__init__()
            self.request = request

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(self.request)
            return super().wait(timeout)

    finder = Finder(engine.scheduler, BLOCK_TOKENS, answer_s=1e-9)  # none comes so soon
    keys = keys_of("few", 4)
    for name in ("a", "b", "c"):
        finder.admit(name)
        finder._requests[name].answered = Event(name)
    while finder.epoch("a") is None:
        time.sleep(0.001)
    while finder.ask("a", keys, 0) is None:
        time.sleep(0.001)
    assert waits == ["a"]  # once in a step
    while finder._desk.under_way():
        time.sleep(0.001)
    finder.next_step()
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert finder.ask("b", keys, 0) is None
        assert waits == ["a"]
        finder.next_step()
        assert finder.ask("b", keys, 0) is None
        assert finder.ask("c", keys, 0) is None
        assert waits == ["a", "b"]
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    finder.close()


def hurried_asks(engine: Engine, request: str, keys: list[bytes]) -> None:
    """Ask until all is held, for on a busy machine an engine without patience may see a miss."""
    while engine.ask(request, keys) != len(keys):
        engine.finder.finish(request, [])
    engine.finder.finish(request, keys)


def test_a_daemon_that_does_not_answer_is_asked_again_and_then_a_miss(
    daemon: Daemon, engine: Engine
) -> None:
    keys = keys_of("a", 2)
    engine.store(keys, payloads_of(2))
    with daemon.client() as client:
        leases = leases_of(client)
    hurried = Engine(daemon, engine.scheduler.layout, patience_s=1.0)
    hurried_asks(hurried, "warm", keys)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert hurried.finder.ask("r", keys, 0) is None
        assert hurried.ask("r", keys) == 0
        unanswered = hurried.scheduler.statistics().get("unanswered asks", 0)
        late = cast("Client", hurried.scheduler.store)._misses["timed out"]
        assert unanswered + late >= 1  # the finder's clock and the client's run to the same end
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    hurried_asks(hurried, "later", keys)
    with daemon.client() as client:
        while leases_of(client) > leases:
            time.sleep(0.01)  # the late answer's lease was given back too
    hurried.close()


def test_a_dead_daemon_is_a_miss_said_once_and_its_successor_serves_again(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    keys, payloads = keys_of("a", 3), payloads_of(3)
    engine = Engine(daemon, layout_of(), patience_s=2.0)
    engine.store(keys, payloads)
    assert engine.ask("r", keys) == 3
    offer = engine.offer(keys_of("b", 3))
    daemon.kill()
    into = empty_like(payloads)
    for job in range(100, 103):
        held = engine.finder.held("r", 0, 3)
        assert held is not None
        engine.workers[0].load(job, held, into, timeout_s=1.0)
        assert engine.end(0, job).blocks == 0
    told: list[int] = []
    engine.workers[0].store(200, offer, payloads, stored=told.append)
    assert engine.end(0, 200).store
    assert engine.ask("s", keys) == 0
    engine.finder.finish("s", keys)
    said = [record.message for record in caplog.records if record.name == "twfs.engines"]
    assert sum("a load failed" in text for text in said) == 1
    assert engine.attached[0].statistics()["a load failed: LeaseEnded"] == 3
    daemon.start()
    while engine.ask("t", keys) == 0:
        engine.finder.finish("t", keys)
        time.sleep(0.05)
    assert engine.load("t", 0, into).blocks == 3
    assert same(into, payloads)
    engine.close()
    assert told == [0]


def test_bytes_that_rotted_are_told_and_so_is_all_behind_them(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 5), payloads_of(5)
    engine.store(keys, payloads)
    assert engine.ask("r", keys) == 5
    with daemon.client() as client:
        info = info_of(client, engine)
        (session,) = client.sessions(info.id)
        third = client.chain_of(info.id, session.head)[2].block.extents[0]
    with (daemon.directory / "device0.img").open("r+b") as image:
        image.seek(third.offset + 5000)
        image.write(b"rot")
        image.flush()
        os.fsync(image.fileno())
    into = empty_like(payloads)
    done = engine.load("r", 0, into)
    assert done.blocks == 2
    assert same(into[:2], payloads[:2])


def test_a_public_beginning_is_stored_once_for_a_group_and_the_rest_for_its_tenant(
    daemon: Daemon, engine: Engine
) -> None:
    """Engine's keys: two public blocks, and two that are acme's own; also told block by block."""
    with daemon.client() as client:
        for name, share in (("acme", "public"), ("other", "public"), ("third", "")):
            given = {"share": share} if share else {}
            client.operate("tenant-add", name=name, owner=0, uids=[], **given)
    tokens = 2 * BLOCK_TOKENS + 3
    keys, payloads = keys_of("a", 4), payloads_of(4)
    engine.finder.admit("first", Params("acme", public_tokens=tokens))
    assert engine.ask("first", keys) == 0
    epoch = engine.finder.epoch("first")
    assert epoch is not None
    parts = [Run(tuple(keys[:1]), None, 0), Run(tuple(keys[1:]), keys[0], 1)]
    for run, part in zip(parts, (payloads[:1], payloads[1:]), strict=True):
        engine.jobs += 1
        before = engine.attached[0].statistics().get("stored blocks", 0)
        engine.workers[0].store(engine.jobs, Offer((run,), epoch, "acme", public=2), part)
        engine.end(0, engine.jobs)
        while engine.attached[0].statistics().get("stored blocks", 0) < before + len(part):
            time.sleep(0.001)
    for tenant, public, held in (
        ("acme", tokens, 4), ("other", tokens, 2), ("other", BLOCK_TOKENS, 1), ("acme", 0, 0),
        ("other", 0, 0), ("other", 4 * BLOCK_TOKENS, 2), ("third", tokens, 0), (None, tokens, 0),
    ):  # fmt: skip
        name = f"{tenant} {public}"
        engine.finder.admit(name, Params(tenant, public_tokens=public))
        assert engine.ask(name, keys) == held, name
    into = empty_like(payloads[:2])
    assert engine.load(f"other {tokens}", 0, into).blocks == 2
    assert same(into, payloads[:2])
    into = empty_like(payloads)
    assert engine.load(f"acme {tokens}", 0, into).blocks == 4
    assert same(into, payloads)
    with daemon.client() as client:
        info = info_of(client, engine)
        assert info.blocks == 4
        (session,) = client.sessions(info.id)
        assert session.blocks == 4  # one chain, across the border
        assert client.detached(info.id) == []
    said = engine.scheduler.statistics()
    assert said["public tokens without a share group: str"] == 2


def test_names_of_keys_are_of_one_chain_however_they_are_cut(engine: Engine) -> None:
    model = replace(
        engine.attached[0].store.open_model("cut", layout_of(model="cut")),
        salt=b"s" * 32, public_salt=b"p" * 32,
    )  # fmt: skip
    keys = keys_of("c", 7)
    for public in range(9):
        whole = names_in(model, keys, None, 0, BLOCK_TOKENS, public=public)
        assert (len(whole), whole.public) == (7, min(public, 7))
        assert whole.parents == (bytes(16) + whole.hashes)[: 16 * 7]
        for cut in range(8):
            above = keys[cut - 1] if cut else None
            rest = names_in(model, keys[cut:], above, cut, BLOCK_TOKENS, public=public)
            assert rest == whole.slice(cut, 7)
            assert joined([whole.head(cut), rest]) == whole
    different = {
        names_in(model, keys, None, 0, BLOCK_TOKENS, public=n).hash_at(6) for n in range(9)
    }
    assert len(different) == 8  # 7 and 8 are public all the same


def until_stored_again(engine: Engine) -> None:
    """Wait until the epoch behind a reset is known, as new requests learn it."""
    while engine.finder.epoch("s") is None:
        engine.finder.admit("s")
        time.sleep(0.001)


def test_a_new_epoch_forgets_all_and_takes_nothing_of_the_old_one(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 3), payloads_of(3)
    engine.store(keys, payloads)
    assert engine.ask("r", keys) == 3
    stale = engine.offer(keys)
    engine.finder.reset()
    assert engine.finder.epoch("r") is None  # nothing is stored until the new epoch is known
    assert engine.ask("r", keys) == 0
    until_stored_again(engine)
    assert engine.ask("r", keys) == 0
    assert engine.ask("s", keys) == 0
    told: list[int] = []
    for job in (50, 51):  # the worker learns of the epoch only by its failing
        engine.workers[0].store(job, stale, payloads, stored=told.append)
        engine.end(0, job)
    engine.workers[0].close()
    assert told == [0, 0]
    assert "stored blocks" in engine.attached[0].statistics()  # of the first store alone
    assert engine.attached[0].statistics()["stored blocks"] == 3
    assert engine.ask("t", keys) == 0
    with daemon.client() as client:
        assert info_of(client, engine).blocks == 0


def test_what_is_stored_behind_a_reset_is_for_this_engine_alone(
    daemon: Daemon, engine: Engine
) -> None:
    """Its weights may be others now than those that everybody else has from the files."""
    keys, updated, payloads = keys_of("a", 3), payloads_of(3, seed=1), payloads_of(3)
    engine.ask("q", keys)
    engine.finder.reset()
    until_stored_again(engine)
    engine.store(keys, updated)
    assert engine.ask("s", keys) == 3
    into = empty_like(updated)
    assert engine.load("s", 0, into).blocks == 3
    assert same(into, updated)
    engine.finder.finish("s", keys)
    other = Engine(daemon, engine.scheduler.layout)  # or the same, started again
    assert other.ask("t", keys) == 0
    other.store(keys, payloads)
    assert other.ask("u", keys) == 3
    assert other.load("u", 0, into).blocks == 3
    assert same(into, payloads)
    assert engine.ask("v", keys) == 3
    assert engine.load("v", 0, into).blocks == 3
    assert same(into, updated)
    engine.finder.reset()
    until_stored_again(engine)
    assert engine.ask("x", keys) == 0
    other.close()


def test_what_a_prompt_that_misses_computes_is_stored_however_long_ago_the_model_was_opened(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "FRESH_SECONDS", 0.0)
    first, second = keys_of("first", 2), keys_of("second", 2)
    engine.store(first, payloads_of(2))  # so the model is open
    assert engine.ask("cold", second) == 0
    before = engine.finder.epoch("cold")
    assert before is not None, "what is computed now would not be stored"
    assert engine.attached[0].new_epoch()
    assert engine.ask("after", first) == 0
    after = engine.finder.epoch("after")
    assert after is not None
    assert after > before, "a miss may mean a new epoch: the model is opened again"


def test_wrong_salt_tenant_and_key_are_misses(
    daemon: Daemon, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    keys = keys_of("a", 2)
    engine.store(keys, payloads_of(2))
    engine.finder.admit("t", Params(tenant="nobody-knows"))
    assert engine.ask("t", keys) == 0
    engine.finder.admit("u", Params(tenant="nobody-knows"))
    assert engine.ask("u", keys) == 0
    assert engine.ask("long", [b"x" * 65, *keys]) == 0
    assert engine.ask("none", [b"", *keys]) == 0
    said = [record.message for record in caplog.records]
    assert sum("no tenant 'nobody-knows'" in text for text in said) == 1
    bad = Offer((Run((b"",), None, 0),), engine.offer(keys).epoch)
    engine.workers[0].store(7, bad, payloads_of(1))
    assert engine.end(0, 7).store
    other = Engine(daemon, layout_of(model="other"))
    assert other.ask("r", keys) == 0
    other.close()


def test_a_finished_request_touches_its_whole_chain_in_one_message(
    daemon: Daemon, engine: Engine
) -> None:
    keys, payloads = keys_of("a", 4), payloads_of(4)
    engine.store(keys, payloads)
    engine.finder.admit("r", Params(hint=Hint(session="agent 7")))
    assert engine.ask("r", keys, start=4) == 4  # all of it in the engine's own memory
    with daemon.client() as client:
        touches = client.statistics()["server"]["requests"].get("touchnames", 0)
        engine.finder.finish("r", keys)
        while client.statistics()["server"]["requests"].get("touchnames", 0) == touches:
            time.sleep(0.001)


def test_a_store_that_finds_no_room_gives_the_engine_its_memory_back(
    daemon: Daemon, engine: Engine
) -> None:
    client = engine.attached[0].store
    assert isinstance(client, Client)
    engine.store(keys_of("a", 1), payloads_of(1))
    link = client._connector.now
    assert link is not None
    assert link.arena is not None
    hog = link.arena.take(link.arena.byte_count - (1 << 16))
    assert hog is not None
    keys = keys_of("b", 8)
    held: SimpleQueue[int] = SimpleQueue()
    engine.workers[0].store(1000, engine.offer(keys), payloads_of(8), stored=held.put)
    engine.workers[0].wait([1000])  # would not return while the hog is there, were it not given up
    hog.release()
    assert [done.job for done in engine.workers[0].finished()] == [1000]
    assert held.get() == 0


def test_a_store_that_has_not_begun_gives_the_memory_back_at_once(
    daemon: Daemon, engine: Engine
) -> None:
    engine.store(keys_of("a", 1), payloads_of(1))
    offer = engine.offer(keys_of("b", 3))
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        held: SimpleQueue[int] = SimpleQueue()
        for job in range(50, 60):  # more than there are threads
            engine.workers[0].store(job, offer, payloads_of(3), stored=held.put)
        engine.workers[0].wait(range(50, 60))  # would take a minute, and the test's time with it
        assert len(engine.workers[0].finished()) == 10
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert [held.get() for _ in range(10)] == [0] * 10


def test_jobs_after_close_have_failed(engine: Engine) -> None:
    engine.workers[0].close()
    engine.workers[0].store(3, engine.offer(keys_of("a", 1)), payloads_of(1))
    assert [done.job for done in engine.workers[0].finished()] == [3]
