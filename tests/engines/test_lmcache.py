"""LMCache with a warehouse as its L2: its contract holds, and vLLM gets the right tokens.

Real packages in an environment of their own (`./run test-engines lmcache`), real processes.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError

import pytest

from support.daemon import Daemon, running_daemon
from support.engines import check_inside, until, until_stored
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.lmcaches import LMCacheServer
from support.vllms import Vllm, random_model
from twfs.client import Client
from twfs.devices.formatting import DeviceSpec
from twfs.records import BlockKey
from twfs.store import BlockInfo, iterate_heads
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

ENGINE: Final = "lmcache"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

INSIDE: Final = Path(__file__).parent / "inside"
TOKENS: Final = 2000  # of a prompt: seven blocks of 256, and a tail that is always computed
BLOCKS: Final = TOKENS // 256


def test_the_adapter_holds_lmcaches_contract(scratch: Path) -> None:
    check_inside(ENGINE, INSIDE / "lmcache_l2.py", scratch, LMCACHE_TRACK_USAGE="false")


@contextmanager
def engine_of(daemon: Daemon, model: Path, **options: Any) -> Iterator[tuple[LMCacheServer, Vllm]]:
    """A server, and an engine on it that caches nothing itself."""
    with (
        LMCacheServer(daemon.socket) as server,
        Vllm("lmcache", model, server.transfer, enable_prefix_caching=False, **options) as vllm,
    ):
        yield server, vllm


def test_tokens_are_the_same_cold_warm_and_after_a_restart_of_everything(
    scratch: Path, model: Path
) -> None:
    prompt, late = ({"seed": seed, "tokens": TOKENS} for seed in (1, 3))
    with running_daemon(scratch / "warehouse") as daemon:
        with (
            LMCacheServer(daemon.socket) as server,
            Vllm("lmcache", model, server.transfer) as vllm,
        ):
            cold = vllm.generate(prompt, out=8)
            assert cold["cached"] == [0]
            until_stored(daemon, BLOCKS)
            warm = vllm.generate(prompt, out=8)  # from LMCache's memory
            assert warm["tokens"] == cold["tokens"]
            other = vllm.generate({"seed": 2, "tokens": TOKENS}, out=8)
            assert other["tokens"] != cold["tokens"]  # the model does look at its prompt
            until_stored(daemon, 2 * BLOCKS)
        daemon.restart()
        with (
            LMCacheServer(daemon.socket) as server,
            Vllm("lmcache", model, server.transfer) as vllm,
        ):
            again = vllm.generate(prompt, out=8)
            assert again["tokens"] == cold["tokens"]
            assert again["cached"] == [256 * BLOCKS]
            assert_seen(daemon, server, model)
            used = last_use(daemon, 256 * BLOCKS)
            assert vllm.generate(prompt, out=8)["tokens"] == cold["tokens"]  # of its own memory
            until(lambda: last_use(daemon, 256 * BLOCKS) > used, "its use is known")
            salted = vllm.generate({**prompt, "salt": "alice"}, out=8)
            assert (salted["tokens"], salted["cached"]) == (cold["tokens"], [0])
            random_model(ENGINE, model, 1)  # other weights, which this engine does not run
            vllm.generate(late, out=8)
            until(lambda: refused(server) >= 2, "neither its lookup nor its store was done")
        with engine_of(daemon, model, dtype="float32") as (_, vllm):
            assert vllm.generate(prompt, out=8)["cached"] == [0]
        with engine_of(daemon, model) as (_, vllm):  # which runs them
            answer = vllm.generate(prompt, out=8)
            assert vllm.generate(late, out=8)["cached"] == [0]
        assert answer["cached"] == [0]
        assert answer["tokens"] != cold["tokens"]
        random_model(ENGINE, model, 0)


def refused(server: LMCacheServer) -> int:
    """How many tasks of a model whose weights have changed were not done."""
    counters = l2_of(server.ask("GET", "/status"))["counters"]
    return int(counters.get("a task failed: WeightsChanged", 0))


def last_use(daemon: Daemon, tokens: int) -> int:
    """When the session of so many tokens that was used last was used, in milliseconds."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        return max(each.last_use_ms for each in client.sessions(info.id) if each.tokens == tokens)


def assert_seen(daemon: Daemon, server: LMCacheServer, model: Path) -> None:
    """Two prompts are two sessions, their blocks LMCache's objects."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        sessions = client.sessions(info.id)
        assert [(each.blocks, each.tokens) for each in sessions] == [(BLOCKS, 256 * BLOCKS)] * 2
        assert client.statistics()["counters"]["matched_blocks"] >= BLOCKS
    found = server.ask("GET", f"/cache/objects?tier=l2&page_size={BLOCKS}")
    more = server.ask("GET", f"/cache/objects?tier=l2&page_token={found['next_page_token']}")
    keys = found["entries"] + more["entries"]
    assert len({each["key"]["chunk_hash_hex"] for each in keys}) == 2 * BLOCKS
    assert {each["key"]["model_name"] for each in keys} == {str(model)}
    until(lambda: l2_of(server.ask("GET", "/status"))["counters"].get("touches", 0) > 0, "a touch")
    status, objects, shown, listed = server.see(daemon)
    l2 = l2_of(json.loads(status))
    assert l2["is_healthy"]
    assert l2["counters"][info.name]["loaded blocks"] == BLOCKS
    assert len(json.loads(objects)["entries"]) == 2 * BLOCKS
    assert re.search(r"^read by host: .* blocks", shown, re.MULTILINE), shown
    assert info.name in listed, listed
    assert f"2 sessions, {2 * BLOCKS} blocks" in listed, listed
    assert f"twfs: L2 of LMCache is the warehouse behind {daemon.socket}" in server.said()


def l2_of(status: Any) -> Any:
    """What the server says of its only L2."""
    (found,) = status["storage_manager"]["l2_adapters"]
    return found


@dataclass(frozen=True)
class Served:
    """One engine, whose store is on a disk that a test commands."""

    disks: FaultyDisks
    daemon: Daemon
    server: LMCacheServer
    vllm: Vllm

    def cold(self, seed: int) -> list[int]:
        """The tokens that the engine computes for a prompt, whose blocks are stored then."""
        with self.daemon.client(arena_bytes=0) as client:
            before = [each.key for each in blocks_of(client)[:1]]
            answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
            assert answer["cached"] == [0]
            until(lambda: is_stored(blocks_of(client), before), "all is stored")
        tokens: list[int] = answer["tokens"][0]
        return tokens

    def again(self, seed: int) -> dict[str, Any]:
        """What it answers when nothing but the warehouse has its KV."""
        self.server.clear()
        answer: dict[str, Any] = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        return answer


def is_stored(chain: list[BlockInfo], before: list[BlockKey]) -> bool:
    """Tell whether a whole prompt is there, and not the one that was there *before*."""
    return len(chain) >= BLOCKS and chain[0].key not in before


def blocks_of(client: Client) -> list[BlockInfo]:
    """The blocks of the session stored last."""
    sessions = [
        client.chain_of(info.id, head)
        for info in client.models()
        for head in iterate_heads(client, info.id)
    ]
    return max(sessions, key=lambda chain: chain[0].block.published_ms, default=[])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("served")
    with faulty_disks(base / "disks", {"a": 64 << 20}) as disks:
        Warehouse.create(base / "warehouse", [DeviceSpec(disks.loops["a"])])
        with (
            running_daemon(base / "warehouse") as daemon,
            engine_of(daemon, model) as (server, vllm),
        ):
            yield Served(disks, daemon, server, vllm)


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_bytes_that_changed_on_the_device_are_computed_again(served: Served) -> None:
    tokens = served.cold(11)
    with served.daemon.client(arena_bytes=0) as client:
        third = blocks_of(client)[2].block
    at = third.extents[0].offset + ALIGN + 1000
    served.disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.FLIP, low=at, high=at + 1))
    answer = served.again(11)
    assert answer["tokens"] == [tokens]
    assert answer["cached"] == [512]
    served.disks.set_rules()
    assert served.again(11)["tokens"] == [tokens]


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_blocks_that_cannot_be_read_are_computed_again(served: Served) -> None:
    tokens = served.cold(12)
    with served.daemon.client(arena_bytes=0) as client:
        first = blocks_of(client)[0].block.extents[0]
    rule = Rule(
        disk="a", op=Op.READ, act=Act.EIO, low=first.offset, high=first.offset + first.length
    )
    served.disks.set_rules(rule)
    answer = served.again(12)
    assert answer["tokens"] == [tokens]
    assert answer["cached"] == [0]
    served.disks.set_rules()


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_a_daemon_killed_during_a_load_costs_that_load(served: Served) -> None:
    tokens = served.cold(13)
    assert served.again(13)["cached"] == [256 * BLOCKS]
    served.disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.HANG))
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(served.again, 13)
        until(lambda: served.disks.hanging() > 0, "the load is under way")
        served.daemon.kill()
        served.disks.set_rules()
        assert answer.result()["tokens"] == [tokens]
    assert answer.result()["cached"] == [0]
    assert served.again(13)["tokens"] == [tokens]  # nobody there at all
    with pytest.raises(HTTPError, match="503"):
        served.server.ask("GET", "/cache/objects?tier=l2")
    assert re.search(r"^twfs, .* failed: .*\(said once\)$", served.server.said(), re.MULTILINE)
    served.daemon.start()
    until(lambda: served.again(13)["cached"] == [256 * BLOCKS], "it is warm again")
    assert served.again(13)["tokens"] == [tokens]


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_what_is_deleted_over_http_is_computed_again(served: Served) -> None:
    tokens = served.cold(14)
    with served.daemon.client(arena_bytes=0) as client:
        chain = blocks_of(client)
        listed = served.server.ask("GET", "/cache/objects?tier=l2")["entries"]
        third = chain[2].block.key
        (key,) = [
            each["key"] for each in listed
            if third.startswith(bytes.fromhex(each["key"]["chunk_hash_hex"]))
        ]  # fmt: skip
        answer = served.server.ask("DELETE", "/cache/objects", {"tier": "all", "keys": [key]})
        assert answer["ok"]
        assert len(blocks_of(client)) == 2  # what goes on from it went too
    answer = served.again(14)
    assert (answer["tokens"], answer["cached"]) == ([tokens], [512])


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_tokens_stay_right_while_blocks_are_evicted(served: Served) -> None:
    """Forty prompts of seven blocks want 70 MiB of a device of 64."""
    tokens = {}
    for seed in range(100, 140):
        tokens[seed] = served.vllm.generate({"seed": seed, "tokens": TOKENS}, out=4)["tokens"]
    hits = 0
    for seed in range(139, 99, -4):
        answer = served.again(seed)
        assert answer["tokens"][0][:4] == tokens[seed][0]
        hits += answer["cached"][0]
    assert hits > 0
    with served.daemon.client(arena_bytes=0) as client:
        assert client.statistics()["counters"]["evicted_blocks"] > 0
