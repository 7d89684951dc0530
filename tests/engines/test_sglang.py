"""SGLang with a warehouse below it: its contracts hold, and the engine gets the right tokens.

Real packages in an environment of their own (`./run test-engines sglang`), real processes; what has
CUDA builds only, and is never called on a CPU, is a stub there.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from support.cli import document
from support.daemon import Daemon, running_daemon
from support.engines import (
    blocks_in,
    check_inside,
    engine_environment,
    engine_python,
    until,
    until_stored,
)
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from support.sglangs import (
    PAGE_TOKENS,
    Sglang,
    command_of,
    hicache_config,
    linker_config,
    options_of,
)
from support.snippets import DOCS
from support.vllms import random_model
from twfs.devices.formatting import DeviceSpec
from twfs.store import BlockInfo, iterate_heads, iterate_sessions
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

ENGINE: Final = "sglang"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

INSIDE: Final = Path(__file__).parent / "inside"
PAGES: Final = 9
PROMPT: Final = {"seed": 1, "tokens": PAGE_TOKENS * PAGES + 20}


def test_the_adapters_hold_sglangs_contracts(scratch: Path) -> None:
    check_inside(ENGINE, INSIDE / "sglang_storage.py", scratch, SGLANG_USE_CPU_ENGINE="1")


def flip_a_byte(daemon: Daemon) -> None:
    """Change one byte of the last layer of the block stored first, where it lies."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        chains = [client.chain_of(info.id, head) for head in iterate_heads(client, info.id)]
    block = min((chain[0].block for chain in chains), key=lambda block: block.published_ms)
    at = block.extents[0].offset + ALIGN + info.layout.block_bytes() - 50
    with (daemon.directory / "device0.img").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 8]))


def test_tokens_are_the_same_cold_warm_after_a_restart_and_without_a_daemon(
    scratch: Path, model: Path, log: Path
) -> None:
    with running_daemon(scratch / "warehouse") as daemon:
        config = linker_config(daemon.socket)
        with Sglang(model, config) as engine:
            cold = engine.generate(PROMPT, out=4)
            assert cold["cached"] == [0]
            until_stored(daemon, PAGES)
            asked = uses(daemon)
            own = engine.generate(PROMPT, out=4)
            assert (own["tokens"], own["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            assert uses(daemon) == asked  # nobody is asked, or told of the use
            assert engine.ask(do="flush")
            warm = engine.generate(PROMPT, out=4)
            assert (warm["tokens"], warm["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            assert uses(daemon) > asked
            named = {"session_id": "chat-7"}
            other = engine.generate({**PROMPT, "seed": 2}, out=4, named=named)
            assert other["tokens"] != cold["tokens"]  # the model does look at its prompt
            assert_namespaces(engine, cold["tokens"])
        daemon.restart()
        with Sglang(model, linker_config(daemon.socket, layerwise=True)) as engine:
            again = engine.generate(PROMPT, out=4)
            assert (again["tokens"], again["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            assert_seen(daemon, model)
            flip_a_byte(daemon)
            assert engine.ask(do="flush")
            assert engine.generate(PROMPT, out=4) == {"aborted": "External KV cache load failed"}
            until(lambda: status_of(daemon)["counters"]["holes"] == 1, "a hole")
            assert engine.ask(do="flush")
            assert engine.generate(PROMPT, out=4)["tokens"] == cold["tokens"]
            daemon.kill()
            assert engine.ask(do="flush")
            alone = engine.generate(PROMPT, out=4)
            assert (alone["tokens"], alone["cached"]) == (cold["tokens"], [0])
            daemon.start()
        for different in ({"dtype": "float32"}, {"page_size": PAGE_TOKENS // 2}):
            with Sglang(model, config, **different) as engine:
                assert engine.generate(PROMPT, out=4)["cached"] == [0]
    page = " ".join((DOCS / "sglang.md").read_text().split())
    for line in re.findall("`(twfs: SGLang's.*?|twfs,|: a store was .*?)`", page):
        assert line.replace("…", str(daemon.socket)) in log.read_text(), line


def uses(daemon: Daemon) -> tuple[int, ...]:
    """How often the daemon was asked, and when what it holds was used last."""
    with daemon.client(arena_bytes=0) as client:
        counters = client.statistics()["counters"]
        (info,) = client.models()
        (session,) = iterate_sessions(client, info.id)
    return counters["matches"], counters["puts"], session.last_use_ms


def assert_namespaces(engine: Sglang, tokens: list[list[int]]) -> None:
    """What an extra key or a salt has written only the same one finds; a session's id arrives."""
    for named in ({"extra_key": ["alice"]}, {"cache_salt": ["alice"]}, {"extra_key": ["bob"]}):
        for hits in (0, PAGE_TOKENS * PAGES):
            answer = engine.generate(PROMPT, out=4, named=named)
            assert (answer["tokens"], answer["cached"]) == (tokens, [hits])
            assert engine.ask(do="flush")


def status_of(daemon: Daemon) -> dict[str, Any]:
    """What `twfs status` counts."""
    found: dict[str, Any] = document("status", daemon.socket)["statistics"]
    return found


def assert_seen(daemon: Daemon, model: Path) -> None:
    """What the page says of `twfs status` and `twfs ls`."""
    status = status_of(daemon)
    assert status["counters"]["matches"] == 1
    assert status["counters"]["matched_blocks"] == PAGES
    assert sum(each["blocks"] for each in status["served"].values()) >= PAGES
    (listed,) = document("ls", daemon.socket)["models"]
    assert listed["model"].startswith(f"{model.name}-")
    ids = [each["ids"] for each in listed["sessions"]]
    assert sorted(ids) == [[], [], [], [], ["chat-7"]]


def test_hicache_has_the_same_tokens_cold_warm_after_a_restart_and_without_a_daemon(
    scratch: Path, model: Path, log: Path
) -> None:
    """SGLang's own HiCache and its threads; registering host memory and copying is PyTorch's."""
    update = random_model(ENGINE, scratch / "update", 1)
    with running_daemon(scratch / "warehouse") as daemon:
        with Sglang(model, hicache_config(daemon.socket)) as engine:
            cold = engine.generate(PROMPT, out=4)
            assert cold["cached"] == [0]
            until_stored(daemon, PAGES)
            own = engine.generate(PROMPT, out=4)
            assert (own["tokens"], own["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            assert engine.ask(do="flush")
            warm = engine.generate(PROMPT, out=4)
            assert (warm["tokens"], warm["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
        daemon.restart()
        with Sglang(model, hicache_config(daemon.socket, keep_on_flush=False)) as engine:
            again = engine.generate(PROMPT, out=4)
            assert (again["tokens"], again["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            for named in ({"extra_key": ["alice"]}, {"cache_salt": ["alice"]}):
                answer = engine.generate(PROMPT, out=4, named=named)
                assert (answer["tokens"], answer["cached"]) == (cold["tokens"], [0])
            until(lambda: engine.ask(do="update", path=str(update)) == "", "weights are updated")
            updated = engine.generate(PROMPT, out=4)
            assert updated["cached"] == [0]
            assert updated["tokens"] != cold["tokens"]
            daemon.kill()
            assert engine.ask(do="flush")
            alone = engine.generate(PROMPT, out=4)
            assert (alone["tokens"], alone["cached"]) == (updated["tokens"], [0])
            daemon.start()
    page = " ".join((DOCS / "sglang.md").read_text().split())
    (line,) = re.findall("`(twfs: HiCache's.*?)`", page)
    assert line.replace("…", str(daemon.socket)) in log.read_text()


def test_weights_that_are_new_are_never_served_what_the_old_ones_computed(
    scratch: Path, model: Path
) -> None:
    """The other weights come by an update of a running engine, then by a start at the same path."""
    update = random_model(ENGINE, scratch / "update", 1)
    with running_daemon(scratch / "warehouse") as daemon:
        config = linker_config(daemon.socket, keep_on_flush=False)
        with Sglang(model, config) as engine:
            old = engine.generate(PROMPT, out=4)["tokens"]
            until_stored(daemon, PAGES)
            until(lambda: engine.ask(do="update", path=str(update)) == "", "weights are updated")
            updated = engine.generate(PROMPT, out=4)
            assert updated["cached"] == [0]
            assert updated["tokens"] != old
            until_stored(daemon, 2 * PAGES)
            assert engine.ask(do="flush")  # nothing says that this is no update
            assert engine.generate(PROMPT, out=4)["cached"] == [0]
        random_model(ENGINE, model, 1)
        with Sglang(model, config) as engine:
            started = engine.generate(PROMPT, out=4)
            assert (started["tokens"], started["cached"]) == (updated["tokens"], [0])
        random_model(ENGINE, model, 0)
        with Sglang(model, config) as engine:
            again = engine.generate(PROMPT, out=4)
            assert (again["tokens"], again["cached"]) == (old, [PAGE_TOKENS * PAGES])


@dataclass(frozen=True)
class Served:
    """One engine, whose store is on a disk that a test commands."""

    disks: FaultyDisks
    daemon: Daemon
    engine: Sglang

    def cold(self, seed: int) -> list[list[int]]:
        """The tokens that the engine computes for a prompt, whose blocks are stored then."""
        held = blocks_in(self.daemon)
        answer = self.engine.generate({**PROMPT, "seed": seed}, out=4)
        assert answer["cached"] == [0]
        until_stored(self.daemon, held + PAGES)
        tokens: list[list[int]] = answer["tokens"]
        return tokens

    def chain(self) -> list[BlockInfo]:
        """The blocks of the prompt stored last."""
        with self.daemon.client(arena_bytes=0) as client:
            (info,) = client.models()
            chains = [client.chain_of(info.id, head) for head in iterate_heads(client, info.id)]
        return max(chains, key=lambda chain: chain[0].block.published_ms)

    def again(self, seed: int) -> dict[str, Any]:
        """What it answers when nothing but the warehouse has its KV; never an aborted request."""
        assert self.engine.ask(do="flush")
        answer = self.engine.generate({**PROMPT, "seed": seed}, out=4)
        assert answer["finish"] == ["length"]
        return answer


@pytest.fixture(scope="module", params=[linker_config, hicache_config])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("served")
    with faulty_disks(base / "disks", {"a": 24 << 20}) as disks:
        Warehouse.create(base / "warehouse", [DeviceSpec(disks.loops["a"])])
        with (
            running_daemon(base / "warehouse") as daemon,
            Sglang(model, request.param(daemon.socket)) as engine,
        ):
            yield Served(disks, daemon, engine)


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.parametrize("act", [Act.FLIP, Act.EIO])
def test_blocks_that_are_read_wrong_or_not_at_all_are_computed_again(
    served: Served, act: Act
) -> None:
    seed = {Act.FLIP: 11, Act.EIO: 12}[act]
    tokens = served.cold(seed)
    extent = served.chain()[2].block.extents[0]
    at = extent.offset + ALIGN + 1000
    served.disks.set_rules(Rule(disk="a", op=Op.READ, act=act, low=at, high=at + 1))
    answer = served.again(seed)
    assert answer["tokens"] == tokens
    assert answer["cached"][0] <= 2 * PAGE_TOKENS  # of the linker nothing, for it loads all or none
    assert served.disks.acted() != [0]
    served.disks.set_rules()
    assert served.again(seed)["tokens"] == tokens


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_a_daemon_killed_during_a_load_costs_that_load(served: Served) -> None:
    tokens = served.cold(13)
    assert served.again(13)["cached"] == [PAGE_TOKENS * PAGES]
    served.disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.HANG))
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(served.again, 13)
        until(lambda: served.disks.hanging() > 0, "the load is under way")
        served.daemon.kill()
        served.disks.set_rules()
        assert answer.result()["tokens"] == tokens
    assert answer.result()["cached"] == [0]
    assert served.again(13)["tokens"] == tokens  # nobody there at all
    served.daemon.start()
    until(lambda: served.again(13)["cached"] == [PAGE_TOKENS * PAGES], "it is warm again")
    assert served.again(13)["tokens"] == tokens


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_tokens_stay_right_while_blocks_are_evicted(served: Served) -> None:
    """Forty-five prompts of nine pages want 27 MiB of a device of 24."""
    tokens = {
        seed: served.engine.generate({**PROMPT, "seed": seed}, out=4)["tokens"]
        for seed in range(100, 145)
    }
    hits = 0
    for seed in range(144, 99, -5):
        answer = served.again(seed)
        assert answer["tokens"] == tokens[seed]
        hits += answer["cached"][0]
    assert hits > 0
    with served.daemon.client(arena_bytes=0) as client:
        assert client.statistics()["counters"]["evicted_blocks"] > 0


@pytest.mark.parametrize("config", [linker_config, hicache_config])
def test_the_pages_commands_start_what_they_say(
    config: Callable[[Path], dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """SGLang's own parser takes them; engines of the other tests run with the same options."""
    given = config(tmp_path / "socket")
    words = command_of(given)
    words[words.index("--model-path") + 1] = str(model)
    source = (
        "import json, sys\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        "print(json.dumps(prepare_server_args(sys.argv[1:]).resolved_dict(), default=str))\n"
    )
    done = subprocess.run(
        [engine_python(ENGINE), "-c", source, *words, "--device", "cpu"],
        capture_output=True, text=True, check=True,
        env=engine_environment(SGLANG_USE_CPU_ENGINE="1"),
    )  # fmt: skip
    taken = json.loads(done.stdout.splitlines()[-1])
    for name, value in options_of(given).items():
        if name not in {"model_path", "hicache_storage_prefetch_policy"}:
            assert taken[name] == value, name
