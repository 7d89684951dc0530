"""A transformers model's KV comes back bit by bit, or not at all.

Real weights (random, tiny), a real warehouse on an image file, no sockets.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from twfs.devices.device import DeviceSpec
from twfs.errors import InvalidInput
from twfs.layout import Layout
from twfs.store import PutOutcome
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from twfs.engines.transformers import PrefixStore, layout_of, revision_of  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.engine

BLOCK_TOKENS: Final = 16
IMAGE_BYTES: Final = ByteCount(64 << 20)


def model_of(seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | overrides)).eval()


def tokens_of(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, 256, (count,), generator=generator).tolist()
    return ids


def compute(model: Any, ids: list[int], kv: Any = None) -> tuple["Tensor", Any]:
    with torch.inference_mode():
        out = model(torch.tensor([ids]), past_key_values=kv, use_cache=True)
    return out.logits[0], out.past_key_values


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


@pytest.fixture
def warehouse(scratch: Path) -> Iterator[Warehouse]:
    directory = scratch / "warehouse"
    Warehouse.create(directory, [DeviceSpec(directory / "device0.img", IMAGE_BYTES)])
    opened = Warehouse.open(directory)
    yield opened
    report = opened.check(data=True)
    opened.close()
    assert report.findings == ()


def prefix_store(warehouse: Any, model: Any, **options: Any) -> PrefixStore:
    return PrefixStore(warehouse, "tiny", model, block_tokens=BLOCK_TOKENS, **options)


def assert_same_kv(loaded: Any, computed: Any, tokens: int) -> None:
    assert len(loaded.layers) == len(computed.layers)
    for mine, theirs in zip(loaded.layers, computed.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :, :tokens])
        assert torch.equal(mine.values, theirs.values[:, :, :tokens])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_kv_is_bit_equal_and_continues_with_equal_logits(
    warehouse: Warehouse, dtype: str
) -> None:
    model = model_of().to(getattr(torch, dtype))
    ids = tokens_of(100)
    _, kv = compute(model, ids)
    store = prefix_store(warehouse, model)
    saved = store.save(ids, kv)
    assert saved.outcomes == (PutOutcome.PUBLISHED,) * 6
    loaded, held = store.load(ids)
    assert held == 96
    assert_same_kv(loaded, kv, held)
    never_saved = transformers.DynamicCache(
        [(layer.keys[:, :, :held], layer.values[:, :, :held]) for layer in kv.layers]
    )
    assert torch.equal(
        compute(model, ids[held:], loaded)[0], compute(model, ids[held:], never_saved)[0]
    )


def test_loading_leaves_at_least_one_token_to_compute(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(4 * BLOCK_TOKENS)
    store = prefix_store(warehouse, model)
    assert store.save(ids, compute(model, ids)[1]).held == 4
    assert store.load(ids)[1] == 3 * BLOCK_TOKENS
    assert store.load([*ids, 7])[1] == 4 * BLOCK_TOKENS
    assert store.load(ids[:1])[1] == 0


def test_one_block_that_is_loaded_equals_what_was_saved(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(BLOCK_TOKENS + 1)
    _, kv = compute(model, ids)
    store = prefix_store(warehouse, model)
    store.save(ids, kv)
    loaded, held = store.load(ids)
    assert held == BLOCK_TOKENS
    assert_same_kv(loaded, kv, held)


def test_second_turn_stores_only_new_blocks(warehouse: Warehouse, model: Any) -> None:
    store = prefix_store(warehouse, model)
    ids = tokens_of(40)
    _, kv = compute(model, ids)
    first = store.save(ids, kv)
    more = tokens_of(40, seed=2)
    _, kv = compute(model, more, kv)
    second = store.save(ids + more, kv)
    assert first.outcomes == (PutOutcome.PUBLISHED,) * 2
    assert second.outcomes == (PutOutcome.PRESENT,) * 2 + (PutOutcome.PUBLISHED,) * 3
    assert second.written_bytes == 3 * (ALIGN + store.model.layout.block_bytes())  # with headers
    assert store.load(ids + more)[1] == 64
    assert_same_kv(store.load([*ids, *more, 1])[0], kv, 80)


def test_sessions_share_the_prefix_that_they_have_in_common(
    warehouse: Warehouse, model: Any
) -> None:
    store = prefix_store(warehouse, model)
    system = tokens_of(48)
    for seed in (3, 4):
        ids = system + tokens_of(32, seed=seed)
        store.save(ids, compute(model, ids)[1])
    (info,) = warehouse.models()
    assert info.blocks == 3 + 2 + 2
    assert info.heads == 2


def test_prompt_that_differs_early_loads_only_what_is_the_same(
    warehouse: Warehouse, model: Any
) -> None:
    store = prefix_store(warehouse, model)
    ids = tokens_of(80)
    _, kv = compute(model, ids)
    store.save(ids, kv)
    changed = [*ids[:40], (ids[40] + 1) % 256, *ids[41:]]
    loaded, held = store.load(changed)
    assert held == 32
    assert_same_kv(loaded, kv, held)


def test_other_weights_never_hit(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(64)
    prefix_store(warehouse, model).save(ids, compute(model, ids)[1])
    other = model_of()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    loaded, held = prefix_store(warehouse, other).load(ids)
    assert (held, loaded.get_seq_length()) == (0, 0)
    assert revision_of(other) != revision_of(model)
    assert revision_of(model_of()) == revision_of(model)


def test_other_salt_never_hits(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(64)
    prefix_store(warehouse, model, salt=b"a").save(ids, compute(model, ids)[1])
    assert prefix_store(warehouse, model, salt=b"b").load(ids)[1] == 0
    assert prefix_store(warehouse, model, salt=b"a").load(ids)[1] == 48


def test_other_tenant_never_hits_and_the_same_does(warehouse: Warehouse, model: Any) -> None:
    for name in ("a", "b"):
        warehouse.operate("tenant-add", name=name, owner=0, uids=[])
    ids = tokens_of(64)
    prefix_store(warehouse, model, tenant="a").save(ids, compute(model, ids)[1])
    for other in ("b", None):
        assert prefix_store(warehouse, model, tenant=other).load(ids)[1] == 0
    assert prefix_store(warehouse, model, tenant="a").load(ids)[1] == 48


def test_public_beginnings_are_shared_by_a_group_and_nothing_behind_them(
    warehouse: Warehouse, model: Any
) -> None:
    for name, share in (("a", "g"), ("b", "g"), ("c", None)):
        given = {} if share is None else {"share": share}
        warehouse.operate("tenant-add", name=name, owner=0, uids=[], **given)
    ids = tokens_of(65)
    a, b, c = (prefix_store(warehouse, model, tenant=name) for name in ("a", "b", "c"))
    kv = compute(model, ids)[1]
    a.save(ids, kv, public_tokens=40)
    loaded, held = b.load(ids, public_tokens=40)
    assert held == 32
    assert_same_kv(loaded, kv, 32)
    assert a.load(ids, public_tokens=40)[1] == 64
    # Without the number, or with another, it is another chain; as before it for who goes on.
    assert (a.load(ids)[1], b.load(ids)[1], c.load(ids)[1]) == (0, 0, 0)
    assert b.load(ids, public_tokens=16)[1] == 16
    assert b.load(ids, public_tokens=64)[1] == 32
    a.save(ids, kv)
    assert (a.load(ids)[1], b.load(ids, public_tokens=40)[1]) == (64, 32)
    with pytest.raises(InvalidInput, match="without a share group"):
        c.load(ids, public_tokens=40)
    assert c.load(ids)[1] == 0
    c.save(ids, kv)
    assert c.load(ids)[1] == 64


def test_what_prefill_takes_tells_what_was_saved(warehouse: Warehouse, model: Any) -> None:
    kv, ids = prefix_store(warehouse, model), tokens_of(65)
    kv.save(ids, compute(model, ids)[1])
    assert kv.load(ids)[1] == 64
    (row,) = warehouse.statistics()["tenants"]["metered"]
    assert row["prefill_seconds_saved"] is None
    kv.count_prefill(640, 2.0)
    kv.count_prefill(640, 3.0)
    (row,) = warehouse.statistics()["tenants"]["metered"]
    assert row["prefill_seconds_saved"] == pytest.approx(row["served_tokens"] * 5.0 / 1280)
    with pytest.raises(InvalidInput, match="prefill of 0 tokens"):
        kv.count_prefill(0, 1.0)


def test_reopened_warehouse_hits(scratch: Path, model: Any) -> None:
    directory = scratch / "warehouse"
    Warehouse.create(directory, [DeviceSpec(directory / "device0.img", IMAGE_BYTES)])
    ids = tokens_of(70)
    _, kv = compute(model, ids)
    before = Warehouse.open(directory)
    prefix_store(before, model).save(ids, kv)
    before.close()
    after = Warehouse.open(directory)
    loaded, held = prefix_store(after, model_of()).load(torch.tensor([ids]))
    findings = after.check(data=True).findings
    after.close()
    assert held == 64
    assert_same_kv(loaded, kv, held)
    assert findings == ()


def test_tensors_that_are_not_contiguous_are_saved_right(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(60)
    _, kv = compute(model, ids)
    for layer in kv.layers:
        layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
    store = prefix_store(warehouse, model)
    store.save(ids, kv)
    assert_same_kv(store.load(ids)[0], kv, 48)


def test_model_with_very_many_heads_is_saved_right(warehouse: Warehouse) -> None:
    model = model_of(
        num_attention_heads=1056, num_key_value_heads=1056, hidden_size=2112,
        intermediate_size=16,
    )  # fmt: skip
    ids = tokens_of(20)
    _, kv = compute(model, ids)
    store = prefix_store(warehouse, model)
    assert store.save(ids, kv).held == 1
    assert_same_kv(store.load(ids)[0], kv, 16)


def test_kv_shorter_than_the_tokens_is_saved_as_far_as_it_goes(
    warehouse: Warehouse, model: Any
) -> None:
    ids = tokens_of(65)
    _, kv = compute(model, ids[:63])
    store = prefix_store(warehouse, model)
    assert len(store.save(ids, kv).outcomes) == 3
    assert store.save(ids[:5], compute(model, ids[:5])[1]).outcomes == ()
    assert store.save(ids, transformers.DynamicCache()).outcomes == ()


def test_batches_and_foreign_kv_are_refused(warehouse: Warehouse, model: Any) -> None:
    store = prefix_store(warehouse, model)
    ids = tokens_of(32)
    _, kv = compute(model, ids)
    with pytest.raises(InvalidInput, match="batch of 2"):
        store.load(torch.tensor([ids, ids]))
    with torch.inference_mode():
        batched = model(torch.tensor([ids, ids]), use_cache=True).past_key_values
    with pytest.raises(InvalidInput, match="for 1 prompts"):
        store.save(ids, batched)
    with pytest.raises(InvalidInput, match="for 3 prompts"):
        store.save_batch(torch.tensor([ids] * 3), batched)
    with pytest.raises(InvalidInput, match="on the left"):
        store.save_batch(torch.tensor([ids] * 2), batched, torch.tensor([[1, 0] * 16] * 2))
    with pytest.raises(InvalidInput, match="32 tokens of KV"):
        store.save(ids[:31], kv)
    with pytest.raises(InvalidInput, match="3 layers"):
        store.save(ids, compute(model_of(num_hidden_layers=3), ids)[1])
    with pytest.raises(InvalidInput, match="bfloat16"):
        store.save(ids, compute(model_of().to(torch.bfloat16), ids)[1])


def batch_of(model: Any, store: PrefixStore, lengths: list[int]) -> tuple["Tensor", "Tensor"]:
    """Prompts of these lengths, padded on the left, and their mask."""
    most = max(lengths)
    ids, mask = torch.zeros(len(lengths), most, dtype=torch.long), torch.zeros(len(lengths), most)
    for row, length in enumerate(lengths):
        ids[row, most - length :] = torch.tensor(tokens_of(length, seed=50 + row))
        mask[row, most - length :] = 1
    return ids, mask.long()


def compute_batch(model: Any, ids: "Tensor", mask: "Tensor", kv: Any = None) -> tuple[Any, Any]:
    """Logits of the last tokens and KV of a padded batch, from column len(kv) on."""
    known = 0 if kv is None else int(kv.get_seq_length())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        out = model(
            ids[:, known:], attention_mask=mask, position_ids=positions[:, known:],
            past_key_values=kv, use_cache=True,
        )  # fmt: skip
    return out.logits[:, -1], out.past_key_values


def test_batch_of_padded_prompts_loads_what_all_rows_have(warehouse: Warehouse, model: Any) -> None:
    store = prefix_store(warehouse, model)
    ids, mask = batch_of(model, store, [70, 50, 61])
    logits, kv = compute_batch(model, ids, mask)
    saved = store.save_batch(ids, kv, mask)
    assert [len(each.outcomes) for each in saved] == [4, 3, 3]
    loaded, columns = store.load_batch(ids, mask)
    assert columns == min(0 + 64, 20 + 48, 9 + 48)  # a row's padding and what it holds
    for mine, theirs in zip(loaded.layers, kv.layers, strict=True):
        for row, pad in enumerate((0, 20, 9)):
            assert torch.equal(mine.keys[row, :, pad:], theirs.keys[row, :, pad:columns])
            assert torch.equal(mine.values[row, :, pad:], theirs.values[row, :, pad:columns])
    again, _ = compute_batch(model, ids, mask, loaded)
    assert torch.allclose(again, logits, atol=1e-4)
    # Each row is a prompt like any other, found alone as well.
    assert store.load(ids[1, 20:])[1] == 48
    assert store.load_batch(torch.tensor([tokens_of(40, 1), tokens_of(40, 2)]))[1] == 0


def test_static_cache_is_saved_and_loaded_into(warehouse: Warehouse, model: Any) -> None:
    ids = tokens_of(70)
    store = prefix_store(warehouse, model)
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    logits, kv = compute(model, ids, static)
    assert store.save(ids, kv).held == 4
    into = transformers.StaticCache(config=model.config, max_cache_len=128)
    loaded, held = store.load(ids, into=into)
    assert loaded is into
    assert (held, int(into.get_seq_length())) == (64, 64)
    for mine, theirs in zip(into.layers, kv.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :held], theirs.keys[:, :, :held])
        assert torch.equal(mine.values[:, :, :held], theirs.values[:, :, :held])
    again, _ = compute(model, ids[held:], into)
    assert torch.allclose(again[-1], logits[-1], atol=1e-4)
    assert_same_kv(store.load(ids)[0], transformers.DynamicCache(
        [(layer.keys[:, :, :64], layer.values[:, :, :64]) for layer in kv.layers]), 64)  # fmt: skip
    with pytest.raises(InvalidInput, match="make the static cache larger"):
        store.load(ids, into=transformers.StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(InvalidInput, match="has 70 tokens in it"):
        store.load(ids, into=into)


def test_caches_that_keep_something_else_are_refused(warehouse: Warehouse, model: Any) -> None:
    store = prefix_store(warehouse, model)
    ids = tokens_of(40)
    sliding = transformers.MistralConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=16,
    )  # fmt: skip
    makers: list[Any] = [
        lambda: transformers.DynamicCache(config=sliding),
        lambda: transformers.StaticCache(config=sliding, max_cache_len=64),
    ]
    for make in makers:
        with pytest.raises(InvalidInput, match="SlidingWindowLayer: only DynamicCache"):
            store.load(ids, into=make())
        kv = make()
        for layer in range(2):
            kv.update(torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16), layer)
        with pytest.raises(InvalidInput, match="SlidingWindowLayer: only DynamicCache"):
            store.save(ids, kv)


def test_latent_attention_is_refused() -> None:
    config = transformers.DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(InvalidInput, match="latent"):
        layout_of(config, torch.float32, model_name="deepseek", revision="")


def test_sliding_window_models_are_refused() -> None:
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=32)
    with pytest.raises(InvalidInput, match="DynamicSlidingWindowLayer"):
        layout_of(config, torch.float32, model_name="mistral", revision="")


def test_layout_says_what_the_config_says() -> None:
    layout = layout_of(
        transformers.LlamaConfig(
            num_hidden_layers=3, hidden_size=96, num_attention_heads=6, num_key_value_heads=3
        ),
        torch.bfloat16,
        model_name="llama",
        revision="r",
        block_tokens=32,
    )
    assert isinstance(layout, Layout)
    assert layout.block_bytes() == 3 * 2 * 3 * 32 * 16 * 2


def test_a_device_that_hangs_is_a_miss_and_not_a_stuck_engine(
    warehouse: Warehouse, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens_of(4 * BLOCK_TOKENS + 1)
    _, kv = compute(model, ids)
    store = prefix_store(warehouse, model, timeout_s=0.2)
    patient = prefix_store(warehouse, model, timeout_s=None)
    store.save(ids, kv)
    assert patient.load(ids)[1] == 4 * BLOCK_TOKENS
    real, asked, go_on = os.preadv, threading.Event(), threading.Event()

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        asked.set()
        assert go_on.wait(60)
        return real(fd, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", preadv)
        try:
            cache, held = store.load(ids)
            assert (len(cache.layers), held) == (0, 0)
            assert asked.is_set()
            assert not go_on.is_set()
        finally:
            go_on.set()
    cache, held = patient.load(ids)
    assert held == 4 * BLOCK_TOKENS
    assert_same_kv(cache, kv, held)
