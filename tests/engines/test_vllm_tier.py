"""twfs below vLLM's CPU tier: what a reset, a fault or other weights put out of reach is computed.

The real tier of vLLM, but for the worker that copies (support.vllmtier): vLLM's own needs a GPU.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from engines.test_vllm import HELD, PROMPT, kill_when, rule_of
from support.daemon import Daemon, running_daemon
from support.engines import blocks_in, until, until_stored
from support.faultrules import Act
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.vllms import (
    DEVICE_BYTES,
    STORED_TOKENS,
    Vllm,
    random_model,
    sessions_of,
    tier_config,
)
from twfs.devices.formatting import DeviceSpec
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT: Final = {"seed": 2, "tokens": 1100}  # its chain is shorter than that of PROMPT


@dataclass(frozen=True)
class Served:
    """An engine with a tier below its CPU tier, on a disk that a test commands."""

    disks: FaultyDisks
    daemon: Daemon
    vllm: Vllm

    def store(self, prompt: dict[str, int], **more: Any) -> dict[str, Any]:
        """The answer to *prompt*, once all of it is stored."""
        answer = self.vllm.generate(prompt, **more)
        self.vllm.ask(do="idle")
        until(lambda: self.again(prompt)["cached"] == [held_of(prompt)], "it is stored")
        return answer

    def again(self, prompt: dict[str, int]) -> dict[str, Any]:
        """The answer when nothing but the store has its KV; what it lacks is then stored."""
        self.vllm.ask(do="empty")
        answer = self.vllm.generate(prompt)
        self.vllm.ask(do="idle")
        return answer

    def failures(self) -> int:
        """Loads that brought less than was asked for, or nothing."""
        counts: dict[str, int] = self.vllm.ask(do="tier")
        return sum(count for what, count in counts.items() if what.startswith("a load"))


def held_of(prompt: dict[str, int]) -> int:
    """Tokens of a prompt that the store can hold."""
    return prompt["tokens"] // STORED_TOKENS * STORED_TOKENS


@pytest.fixture(scope="module")
def served(engine: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("served")
    with faulty_disks(base / "disks", {"a": DEVICE_BYTES}) as disks:
        Warehouse.create(base / "w", [DeviceSpec(disks.loops["a"])])
        with (
            running_daemon(base / "w") as daemon,
            Vllm(engine, model, tier_config(daemon.socket)) as vllm,
        ):
            yield Served(disks, daemon, vllm)


@needs_faults
@pytest.mark.parametrize("how", [{"do": "reset", "connector": True}, {"do": "pause"}],
                         ids=["reset", "pause"])  # fmt: skip
def test_after_a_reset_nothing_that_was_stored_hits(served: Served, how: dict[str, Any]) -> None:
    """Its weights may be others now: vLLM itself empties its CPU tier alone."""
    cold = served.store(SHORT)
    assert served.vllm.ask(**how) in {True, None}
    after = served.vllm.generate(SHORT)
    assert (after["cached"], after["tokens"]) == ([0], cold["tokens"])
    assert served.store(SHORT)["tokens"] == cold["tokens"]  # in the new epoch


@needs_faults
def test_what_is_served_from_above_is_a_use_of_what_is_below(served: Served) -> None:
    """A touch alone moves a session, or the hottest prefixes would look coldest."""
    prompt = SHORT | {"seed": 3}
    told = {name: {"twfs": {"session": name}} for name in ("a", "own memory", "cpu tier")}
    served.store(prompt, params=told["a"])
    for name, wipe in (("own memory", False), ("cpu tier", True)):
        if wipe:
            assert served.vllm.ask(do="reset")
        before = matches_of(served.daemon)
        assert served.vllm.generate(prompt, params=told[name])["cached"][0] >= held_of(prompt)
        served.vllm.ask(do="idle")
        until_session(served.daemon, name)
        assert matches_of(served.daemon) == before  # nobody has asked the store


@needs_faults
def test_a_load_from_below_that_fails_is_computed_with_the_right_tokens(served: Served) -> None:
    cold = served.store(PROMPT)
    faults: list[tuple[str, Act, Callable[[], None]]] = [
        ("device EIO", Act.EIO, lambda: None),
        ("daemon killed mid-load", Act.HANG, lambda: kill_when(served.disks, served.daemon)),
        ("a device that hangs", Act.HANG, lambda: None),
    ]
    with ThreadPoolExecutor(1) as helper:
        for name, act, meanwhile in faults:
            before = served.failures()
            served.disks.set_rules(rule_of(served.daemon, act))
            other = helper.submit(meanwhile)
            failed = served.again(PROMPT)
            other.result()
            assert failed["tokens"] == cold["tokens"], name
            assert failed["cached"][0] < HELD, name
            assert served.failures() == before + 1, name
            served.disks.lift()
            if served.daemon.process is None:
                served.daemon.start()
            until(lambda: served.again(PROMPT)["cached"] == [HELD], f"whole again after {name}")


def matches_of(daemon: Daemon) -> int:
    """How often the daemon was asked."""
    with daemon.client(arena_bytes=0) as client:
        count: int = client._daemon_statistics()["counters"]["matches"]
        return count


def until_session(daemon: Daemon, name: str) -> None:
    """Wait until a session has this id."""
    until(lambda: any(name in each.ids for each in sessions_of(daemon)), f"session {name}")


def test_the_tier_below_another_connector_is_refused(engine: str, model: Path, log: Path) -> None:
    """It would hear neither which model it serves nor of a reset."""
    config = tier_config(log / "socket")
    del config["kv_connector_module_path"]
    with pytest.raises(AssertionError, match="the engine has ended"):
        Vllm(engine, model, config | {"kv_connector": "OffloadingConnector"})
    assert "use TwfsTierConnector of twfs.engines.vllm_tier" in log.read_text()


def test_other_weights_under_the_same_path_never_hit(
    engine: str, model: Path, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "same-path"
    shutil.copytree(model, path)
    answers = []
    for seed in (None, 2):
        if seed is not None:
            shutil.rmtree(path)
            random_model(engine, path, seed)
        before = blocks_in(daemon)
        with Vllm(engine, path, tier_config(daemon.socket)) as vllm:
            answers.append(vllm.generate(PROMPT))
            vllm.ask(do="idle")
            until_stored(daemon, before + 1)
    assert [each["cached"] for each in answers] == [[0], [0]]
    assert answers[0]["tokens"] != answers[1]["tokens"]
    with daemon.client(arena_bytes=0) as client:
        assert len(client.models()) == 2
