"""What becomes of the store ends no generation: a load is a miss, a save says that it was not kept.

A random model answers greedily from whatever was loaded; its tokens are those of no store at all.
Real daemon, real faults: of the device, of the bytes on it, of the daemon while it is read from.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import PATIENT_S, Daemon, running_daemon
from support.engines import until
from support.faultrules import Act, Op, Rule
from support.faultydisks import FaultyDisks, faulty_disks, needs_faults
from twfs.client import Client
from twfs.devices.formatting import DeviceSpec
from twfs.store import BlockInfo, PutOutcome, PutResult, Retention, iterate_heads
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from twfs.engines import transformers as adapter  # noqa: E402
from twfs.engines.transformers import PrefixStore  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

STEP: Final = 16  # tokens of a block
BLOCKS: Final = 6
ANSWER: Final = 5  # tokens
DEVICE_BYTES: Final = ByteCount(16 << 20)
PLACES: Final = ("daemon", "in process")


def model_of(dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(getattr(torch, dtype))


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


def prompt_of(seed: int, tokens: int = BLOCKS * STEP + 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, 256, (tokens,), generator=generator).tolist()
    return ids


def store_of(store: Any, model: Any, **options: Any) -> PrefixStore:
    given = {"block_tokens": STEP, "timeout_s": PATIENT_S, **options}
    return PrefixStore(store, "tiny", model, **given)


def answer(model: Any, ids: list[int], kv: Any) -> list[int]:
    """Greedy tokens behind *ids*, of which *kv* has the beginning; it has all of them then."""
    known, found = kv.get_seq_length(), list[int]()
    new = ids[known:]
    with torch.inference_mode():
        for _ in range(ANSWER):
            out = model(torch.tensor([new]), past_key_values=kv, use_cache=True)
            new = [int(out.logits[0, -1].argmax())]
            found += new
    return found


def turn(model: Any, kv: PrefixStore, ids: list[int]) -> tuple[int, list[int]]:
    """What a program does for a prompt, as in docs/transformers.md: tokens that hit, its answer."""
    cache, held = kv.load(ids)
    found = answer(model, ids, cache)
    kv.save(ids + found[:-1], cache)
    return held, found


def cold(model: Any, ids: list[int]) -> list[int]:
    """The answer without any store."""
    return answer(model, ids, transformers.DynamicCache())


def save(model: Any, kv: PrefixStore, ids: list[int]) -> PutResult:
    """Compute the KV of *ids* and store it."""
    with torch.inference_mode():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return kv.save(ids, cache)


@contextmanager
def opened(place: str, directory: Path) -> Iterator[Any]:
    """A store behind a daemon, or a warehouse in this process, of 16 MiB."""
    if place == "daemon":
        with (
            running_daemon(directory, device_bytes=DEVICE_BYTES) as running,
            running.client() as connected,
        ):
            yield connected
    else:
        Warehouse.create(directory, [DeviceSpec(directory / "device0.img", DEVICE_BYTES)])
        with Warehouse.open(directory) as warehouse:
            yield warehouse


def chain_of(client: Client) -> list[BlockInfo]:
    """The blocks of the only session."""
    (info,) = client.models()
    (head,) = iterate_heads(client, info.id)
    return client.chain_of(info.id, head)


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    with running_daemon(scratch / "w") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


def test_other_dtype_and_other_block_size_never_hit(client: Client, model: Any) -> None:
    ids = prompt_of(1)
    turn(model, store_of(client, model), ids)
    assert store_of(client, model).load(ids)[1] == BLOCKS * STEP
    half = model_of("bfloat16")
    assert store_of(client, half).load(ids)[1] == 0
    assert store_of(client, model, block_tokens=2 * STEP).load(ids)[1] == 0
    turn(half, store_of(client, half), ids)
    assert store_of(client, half).load(ids)[1] == BLOCKS * STEP
    assert store_of(client, model).load(ids)[1] == BLOCKS * STEP


def test_a_byte_that_changed_on_the_device_is_computed_again(
    daemon: Daemon, client: Client, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt_of(2)
    kv = store_of(client, model)
    assert turn(model, kv, ids) == (0, cold(model, ids))
    at = chain_of(client)[2].block.extents[0].offset + ALIGN + 500
    with (daemon.directory / "device0.img").open("r+b") as image:
        image.seek(at)
        byte = image.read(1)[0]
        image.seek(at)
        image.write(bytes([byte ^ 0x10]))
    assert turn(model, kv, ids) == (2 * STEP, cold(model, ids))
    assert kv.statistics()["a load was short: ReadOutcome"] == 1
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    until(lambda: turn(model, kv, ids)[0] == BLOCKS * STEP, "it was stored anew")
    assert turn(model, kv, ids) == (BLOCKS * STEP, cold(model, ids))


@pytest.fixture
def faulty(scratch: Path) -> Iterator[tuple[FaultyDisks, Daemon]]:
    with faulty_disks(scratch / "disks", {"a": 32 << 20}) as disks:
        Warehouse.create(scratch / "w", [DeviceSpec(disks.loops["a"])])
        with running_daemon(scratch / "w") as running:
            yield disks, running


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_a_block_that_cannot_be_read_is_computed_again(
    faulty: tuple[FaultyDisks, Daemon], model: Any
) -> None:
    disks, daemon = faulty
    ids = prompt_of(3)
    with daemon.client() as client:
        kv = store_of(client, model)
        turn(model, kv, ids)
        bad = chain_of(client)[3].block.extents[0]
        low, high = bad.offset, bad.offset + bad.length
        disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.EIO, low=low, high=high))
        assert turn(model, kv, ids) == (3 * STEP, cold(model, ids))
        disks.set_rules()


@needs_faults
@pytest.mark.root
@pytest.mark.fuse
def test_a_daemon_killed_during_a_load_costs_that_load(
    faulty: tuple[FaultyDisks, Daemon], model: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(adapter, "FRESH_SECONDS", 0)  # a miss asks at once why it is one
    disks, daemon = faulty
    ids = prompt_of(4)
    with daemon.client() as client, ThreadPoolExecutor(1) as threads:
        kv = store_of(client, model)
        turn(model, kv, ids)
        disks.set_rules(Rule(disk="a", op=Op.READ, act=Act.HANG))
        under_way = threads.submit(turn, model, kv, ids)
        until(lambda: disks.hanging() > 0, "the load is under way")
        daemon.kill()
        disks.set_rules()
        assert under_way.result() == (0, cold(model, ids))
        for _ in range(2):  # nobody there at all
            assert turn(model, kv, ids) == (0, cold(model, ids))
        assert kv.statistics()["the model cannot be opened: NoDaemon"] > 1
        said = [each.getMessage() for each in caplog.records]
        assert sum("the model cannot be opened" in each for each in said) == 1, said
        assert len(said) == len(set(said))
        daemon.start()
        until(lambda: turn(model, kv, ids)[0] == BLOCKS * STEP, "it is warm again")
        assert turn(model, kv, ids) == (BLOCKS * STEP, cold(model, ids))


@pytest.mark.parametrize("place", PLACES)
def test_after_a_new_epoch_nothing_raises_and_what_comes_later_is_kept(
    place: str, scratch: Path, model: Any
) -> None:
    with opened(place, scratch / "w") as store:
        ids = prompt_of(5)
        kv = store_of(store, model)
        turn(model, kv, ids)
        cache, held = kv.load(ids)
        assert held == BLOCKS * STEP
        store.new_epoch(kv.model)  # the weights were changed, say
        found = answer(model, ids, cache)
        result = kv.save(ids + found[:-1], cache)  # may be of the weights before
        assert set(result.outcomes) == {PutOutcome.FAILED}
        assert result.held == 0
        assert kv.statistics()["a save failed: StaleEpoch"] == 1
        assert turn(model, kv, ids) == (0, cold(model, ids))
        assert turn(model, kv, ids) == (BLOCKS * STEP, cold(model, ids))
        assert kv.statistics()["a save failed: StaleEpoch"] == 1


def test_one_that_only_loads_finds_the_new_epoch_too(
    client: Client, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_of(6)
    reader, writer = store_of(client, model), store_of(client, model)
    client.new_epoch(writer.model)
    turn(model, store_of(client, model), ids)
    assert reader.load(ids)[1] == reader.load(ids)[1] == 0  # it was opened a moment ago
    monkeypatch.setattr(adapter, "FRESH_SECONDS", 0)
    assert reader.load(ids)[1] == 0
    assert reader.load(ids)[1] == BLOCKS * STEP


@pytest.mark.parametrize("place", PLACES)
def test_what_there_is_no_room_for_is_not_kept_and_said_once(
    place: str, scratch: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directory = scratch / "w"
    directory.mkdir()
    (directory / "twfs.toml").write_text("[retention.pinned]\nshare = 0.02\n")  # 320 KiB
    with opened(place, directory) as store:
        kv = store_of(store, model, retention=Retention.PINNED)
        outcomes = set[PutOutcome]()
        for seed in range(20):
            outcomes |= set(save(model, kv, prompt_of(seed)).outcomes)
            if PutOutcome.NO_ROOM in outcomes:
                break
        for seed in range(20, 22):
            outcomes |= set(save(model, kv, prompt_of(seed)).outcomes)
        assert outcomes == {PutOutcome.PUBLISHED, PutOutcome.NO_ROOM}
        assert turn(model, kv, prompt_of(30)) == (0, cold(model, prompt_of(30)))
        assert kv.statistics()["a save failed: PromiseRefused"] > 1
        said = [each.getMessage() for each in caplog.records]
        assert sum("a save failed" in each for each in said) == 1, said


def test_a_tenant_at_its_quota_is_told_so(client: Client, model: Any) -> None:
    client.operate("tenant-add", name="acme", owner=os.getuid(), uids=[], quota_bytes=32 << 10)
    kv = store_of(client, model, tenant="acme")
    assert PutOutcome.OVER_QUOTA in save(model, kv, prompt_of(1)).outcomes
    assert turn(model, kv, prompt_of(1))[1] == cold(model, prompt_of(1))


def test_one_that_may_not_write_keeps_nothing_and_goes_on(daemon: Daemon, model: Any) -> None:
    with daemon.client(arena_bytes=0) as reader:
        kv = store_of(reader, model)
        ids = prompt_of(1)
        assert set(save(model, kv, ids).outcomes) == {PutOutcome.FAILED}
        assert turn(model, kv, ids) == (0, cold(model, ids))
        assert kv.statistics()["a save failed: InvalidInput"] == 2
