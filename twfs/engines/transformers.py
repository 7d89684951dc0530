"""KV of Hugging Face transformers models, kept between requests and processes.

Dynamic and static caches, one prompt or a batch. Not for sliding-window, recurrent, quantised or
latent (MLA) KV, which are refused. A PrefixStore is used by one thread at a time; several may share
a Store. Once it is made it raises only for arguments that are wrong: whatever becomes of the store
is a miss, or a save that says so, logged once for each kind and counted.
"""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from twfs.checksums import lanes_of
from twfs.datapath.upload import PIECES_MAX
from twfs.devices.arena import Arena
from twfs.engines.attaching import FRESH_SECONDS, Quiet
from twfs.errors import InvalidInput, QuotaExceeded, StaleEpoch, TwfsError, WarehouseFull
from twfs.layout import Arrangement, Group, Layout
from twfs.prefix import Names, tokens_to_bytes
from twfs.store import (
    LeasedMatch,
    Model,
    Pieces,
    PutOutcome,
    PutResult,
    Retention,
    Store,
)
from twfs.units import ByteCount, align_up

if TYPE_CHECKING:
    import torch

# Where a model came from and which library wrote its config say nothing about its KV.
CONFIG_IGNORED: Final = frozenset({"_name_or_path", "transformers_version", "architectures"})
COUNTERS: Final = ("saves", "loads", "saved_bytes", "asked_tokens", "hit_tokens")
READ_TIMEOUT_S: Final = 5.0  # then computing the rest again is sooner done
NAME_HEX: Final = 8  # digits of the fingerprint in a model's name: tells its layouts apart
UNKNOWN: Final = -1  # as many public tokens no chain has
KEPT: Final = frozenset({PutOutcome.PUBLISHED, PutOutcome.PRESENT, PutOutcome.NOT_ADMITTED})


def revision_of(model: Any) -> str:
    """Return 32 hex digits that name the config and every weight of *model*, wherever it runs.

    Reads all weights once, at memory speed, on their device.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in CONFIG_IGNORED}
    state = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        sums = lanes_of(weight.detach().contiguous())
        state.update(f"\0{name} {weight.dtype} {tuple(weight.shape)} {sums}".encode())
    return state.hexdigest()


def layout_of(
    config: Any, dtype: "torch.dtype", *, model_name: str, revision: str, block_tokens: int = 256
) -> Layout:
    """Return the layout of the KV that a model with this *config* keeps in *dtype*.

    InvalidInput if its attention keeps anything but all keys and values of all tokens.
    """
    from transformers import DynamicCache  # noqa: PLC0415 - seconds, and only if it is used
    from transformers.cache_utils import DynamicLayer  # noqa: PLC0415

    config = config.get_text_config(decoder=True)
    odd = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {
        DynamicLayer.__name__
    }
    if odd or getattr(config, "kv_lora_rank", None):
        raise InvalidInput(
            f"model {model_name} keeps {', '.join(sorted(odd)) or 'latent (MLA) KV'} in some of "
            "its layers: only full attention in every layer can be kept by this adapter"
        )
    heads = config.num_attention_heads
    group = Group(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=str(dtype).removeprefix("torch."),
        arrangement=Arrangement.LAYER_KV_HEAD_TOKEN,
    )
    return Layout(model_name, (group,), block_tokens, revision=revision, engine="transformers")


class PrefixStore:
    """The KV of one model in a Store: save after a turn, load before the next.

    *hf_model* is only looked at here and not kept. Its weights are part of the model's name in the
    store (*model_name* and 8 hex digits), so other weights never hit. Making one opens that model,
    and raises where this does (NoDaemon). The KV belongs to *tenant* (None: everybody), for which
    this user must be allowed to act; *salt* keeps parts of it apart.
    What a load has not read after *timeout_s* seconds (a device hangs) is a miss; None: it waits.
    """

    def __init__(
        self,
        store: Store,
        model_name: str,
        hf_model: Any,
        *,
        block_tokens: int = 256,
        tenant: str | None = None,
        salt: bytes = b"",
        retention: Retention = Retention.STANDARD,
        timeout_s: float | None = READ_TIMEOUT_S,
    ) -> None:
        layout = layout_of(
            hf_model.config, hf_model.dtype, model_name=model_name,
            revision=revision_of(hf_model), block_tokens=block_tokens,
        )  # fmt: skip
        name = f"{model_name}-{layout.fingerprint.hex()[:NAME_HEX]}"
        self.model = store.open_model(name, layout, tenant=tenant)
        self._opened_s = time.monotonic()
        self._doubted = False  # to be opened again before the next use
        self._quiet = Quiet(name)
        self._store = store
        self._tenant = tenant
        self._salt = salt
        self._retention = retention
        self._timeout_s = timeout_s
        self._device = hf_model.device
        self._dtype = hf_model.dtype
        self._chain = self.model.chain(salt)
        self._public = 0
        self._seen = b""  # the tokens in _chain, so that a turn hashes only what is new
        self._counts = {
            "saves": 0,
            "loads": 0,
            "saved_bytes": 0,
            "asked_tokens": 0,
            "hit_tokens": 0,
        }

    def save(self, token_ids: Any, past_key_values: Any, *, public_tokens: int = 0) -> PutResult:
        """Store every whole block of *past_key_values*, the KV of *token_ids* from the first on.

        Only what the store lacks is copied; the outcomes are of all whole blocks in order.
        The first *public_tokens* (a system prompt, tools) are shared with the tenants of the share
        group, as far as they fill blocks: load with the same number. InvalidInput on a batch, on KV
        of another shape than the model's, on more KV than tokens, or on public tokens of a tenant
        in no group. What the store cannot keep has another outcome than PUBLISHED or PRESENT. So it
        is with KV that was computed before a new epoch: what comes after it is kept again.
        """
        ids = _flat_ids(token_ids)
        self._begin(public_tokens)
        group = self.model.layout.groups[0]
        return self._save(ids, _tensors_of(past_key_values, group, self._dtype, rows=1))

    def save_batch(
        self, token_ids: Any, past_key_values: Any, attention_mask: Any = None
    ) -> list[PutResult]:
        """As save, for each row of *token_ids* [B, T], padded on the left where the mask is 0."""
        rows = _rows_of(token_ids, attention_mask)
        self._begin(0)
        group = self.model.layout.groups[0]
        tensors = _tensors_of(past_key_values, group, self._dtype, rows=len(rows))
        return [
            self._save(ids, [tensor[at : at + 1, :, pad:] for tensor in tensors])
            for at, (ids, pad) in enumerate(rows)
        ]

    def _save(self, ids: Any, tensors: "list[torch.Tensor]") -> PutResult:
        """Store whole blocks of K and V of every layer, [1, heads, tokens, dim] each."""
        names = self._names(ids)
        group, step = self.model.layout.groups[0], self.model.layout.block_tokens
        length = tensors[0].shape[2] if tensors else 0
        if length > len(self._seen) // 4:
            raise InvalidInput(f"{length} tokens of KV were given with {len(self._seen) // 4} ids")
        names = names.head(length // step)
        held = self._quiet.quietly("a lookup failed", lambda: self._use(names), 0)
        outcomes, written = (PutOutcome.PRESENT,) * held, ByteCount(0)
        if held < len(names):
            by_head = len(tensors) * group.kv_heads <= PIECES_MAX
            payloads = [
                _pieces(tensors, at * step, (at + 1) * step, by_head=by_head)
                for at in range(held, len(names))
            ]
            result = self._put(names.slice(held, len(names)), payloads)
            outcomes, written = outcomes + result.outcomes, result.written_bytes
        self._counts["saves"] += 1
        self._counts["saved_bytes"] += written
        return PutResult(outcomes, written)

    def _use(self, names: Names) -> int:
        """Count a use of those of *names* that are held; how many."""
        held = self._store.lookup(self.model, names)
        self._store.touch(self.model, names.head(held))
        return held

    def _put(self, names: Names, payloads: Sequence[Pieces]) -> PutResult:
        """Store what can be kept; of the rest the outcome says why not."""
        try:
            result = self._store.put(self.model, names, payloads, retention=self._retention)
        except Exception as error:  # noqa: BLE001 - a save that fails must not end a generation
            known = isinstance(error, TwfsError | OSError)
            self._quiet.complain("a save failed", error, unexpected=not known)
            self._doubted = isinstance(error, StaleEpoch)
            return PutResult((_outcome_of(error),) * len(names), ByteCount(0))
        lost = set(result.outcomes) - KEPT
        for outcome in sorted(lost):
            self._quiet.complain(
                f"blocks were not kept ({outcome})", f"some of {len(names)} blocks"
            )
        return result

    def load(self, token_ids: Any, into: Any = None, *, public_tokens: int = 0) -> tuple[Any, int]:
        """Return a cache with the longest held prefix of *token_ids*, and its tokens.

        That is *into*, an empty cache with room for it (StaticCache), or else a new DynamicCache.
        At least one token is always left to compute, since its logits are what a prompt is sent
        for. A miss is an empty cache and 0. *public_tokens* as in save. InvalidInput on a batch.
        """
        cache = _empty_cache(into)
        self._begin(public_tokens)
        tensors, held = self._load(_flat_ids(token_ids))
        if held:
            _fill(cache, tensors)
        return cache, held

    def load_batch(
        self, token_ids: Any, attention_mask: Any = None, into: Any = None
    ) -> tuple[Any, int]:
        """As load, for the rows of *token_ids* [B, T], padded on the left where the mask is 0.

        The columns that are there of every row, so as many as the row with most to compute allows;
        the model computes `token_ids[:, columns:]` with the whole mask.
        """
        import torch  # noqa: PLC0415 - the model that was given has imported it

        cache, rows = _empty_cache(into), _rows_of(token_ids, attention_mask)
        self._begin(0)
        loaded = [self._load(ids) for ids, _ in rows]
        length = len(rows[0][0]) + rows[0][1]
        columns = min(pad + held for (_, pad), (_, held) in zip(rows, loaded, strict=True))
        if columns <= min(pad for _, pad in rows) or columns >= length:
            return cache, 0
        group = self.model.layout.groups[0]
        shape = (len(rows), group.kv_heads, columns, group.head_size)
        whole = [
            torch.zeros(shape, dtype=self._dtype, device=self._device)
            for _ in range(2 * group.layers)
        ]
        for at, ((_, pad), (tensors, _)) in enumerate(zip(rows, loaded, strict=True)):
            if pad < columns:
                for into_rows, tensor in zip(whole, tensors, strict=True):
                    into_rows[at, :, pad:] = tensor[0, :, : columns - pad]
        _fill(cache, whole)
        return cache, columns

    def _load(self, ids: Any) -> "tuple[list[torch.Tensor], int]":
        """K and V of every layer of the longest held prefix of *ids*, and its tokens."""
        names = self._names(ids)
        tokens = len(self._seen) // 4
        names = names.head(max(tokens - 1, 0) // self.model.layout.block_tokens)
        tensors: list[torch.Tensor] = []
        if len(names):
            tensors = self._quiet.quietly("a load failed", lambda: self._match(names), [])
        held = tensors[0].shape[2] if tensors else 0
        self._counts["loads"] += 1
        self._counts["asked_tokens"] += tokens
        self._counts["hit_tokens"] += held
        return tensors, held

    def _match(self, names: Names) -> "list[torch.Tensor]":
        """As _load, of the longest held part of *names*."""
        with self._store.match(self.model, names) as match:
            if match.blocks:
                return self._read(match)
        # Perhaps there is a new epoch, or no daemon: opening the model tells, not at every miss.
        self._doubted |= time.monotonic() - self._opened_s > FRESH_SECONDS
        return []

    def _read(self, match: LeasedMatch) -> "list[torch.Tensor]":
        """Read what *match* holds; K and V of every layer, [1, heads, tokens, dim]."""
        import torch  # noqa: PLC0415 - the model that was given has imported it

        layout = self.model.layout
        group, payload_bytes = layout.groups[0], layout.block_bytes()
        step = align_up(payload_bytes)
        on_cpu = self._device.type == "cpu"
        # Huge pages double the speed of a host read; on a GPU torch's own memory is as good.
        arena = Arena.private(match.blocks * step) if on_cpu else None
        flat = (
            torch.frombuffer(arena.view, dtype=torch.uint8)
            if arena is not None
            else torch.empty(match.blocks * step, dtype=torch.uint8, device=self._device)
        )
        rows = flat.view(match.blocks, step)[:, :payload_bytes]
        report = match.read_into(list(rows.unbind()), timeout_s=self._timeout_s)
        blocks = report.blocks
        if blocks < match.blocks:
            self._quiet.complain("a load was short", report.outcomes[blocks])
        if not blocks:
            return []
        # [block, layer, K or V, head, token, dim]; a layer's tensor wants [head, all tokens].
        shape = (blocks, group.layers, 2, group.kv_heads, layout.block_tokens, group.head_size)
        held = rows[:blocks].view(self._dtype).view(shape)
        return [
            held[:, layer, kv].transpose(0, 1).reshape(1, shape[3], -1, shape[5])
            for layer in range(group.layers)
            for kv in (0, 1)
        ]

    def _begin(self, public_tokens: int) -> None:
        """Let what follows have so many public tokens, and the model's present epoch."""
        if self._doubted:
            self._reopen()
        if public_tokens != self._public:
            before, self._public = self._public, public_tokens
            try:
                self._restart()
            except InvalidInput:
                self._public = before
                raise

    def _reopen(self) -> None:
        """Open the model again; it stays as it is if that fails."""
        self._doubted, self._opened_s = False, time.monotonic()
        model: Model = self._quiet.quietly(
            "the model cannot be opened",
            lambda: self._store.open_model(self.model.name, self.model.layout, tenant=self._tenant),
            self.model,
        )
        if model != self.model:
            self.model, self._public = model, UNKNOWN  # so that a new chain begins

    def _restart(self) -> None:
        """Begin a new chain."""
        self._chain = self.model.chain(self._salt, public_tokens=self._public)
        self._seen = b""

    def _names(self, ids: Any) -> Names:
        """Return the names of the whole blocks of *ids*, hashing only what is new."""
        data = tokens_to_bytes(ids)
        if not data.startswith(self._seen):
            self._restart()
        self._chain.extend(np.frombuffer(data[len(self._seen) :], "<u4"))
        self._seen = data
        return self._chain.names()

    def count_prefill(self, tokens: int, seconds: float) -> None:
        """Say how long computing so many tokens of prompts took, from which savings are told.

        Only the caller knows: a GPU must have been waited for. InvalidInput as in the store.
        """
        try:
            self._store.count_prefill(self.model, tokens, seconds)
        except InvalidInput:
            raise
        except TwfsError as error:
            self._quiet.complain("a rate was not told", error)

    def statistics(self) -> dict[str, int]:
        """Calls, bytes written, tokens asked for and loaded; failures as `what: class`."""
        return self._counts | self._quiet.statistics()


def _outcome_of(error: Exception) -> PutOutcome:
    """What becomes of blocks whose put raised *error*."""
    if isinstance(error, QuotaExceeded):
        return PutOutcome.OVER_QUOTA
    return PutOutcome.NO_ROOM if isinstance(error, WarehouseFull) else PutOutcome.FAILED


def _flat_ids(token_ids: Any) -> Any:
    """Return token ids of one sequence (list, array or tensor, [T] or [1, T]) as list or array."""
    if isinstance(token_ids, list | tuple):
        return token_ids
    ids = np.asarray(token_ids.cpu() if hasattr(token_ids, "cpu") else token_ids)
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise InvalidInput(f"a batch of {ids.shape[0]} prompts: use save_batch and load_batch")
    return ids.reshape(-1)


def _rows_of(token_ids: Any, attention_mask: Any) -> list[tuple[Any, int]]:
    """Return the ids of each row without its padding, and how much of that is on its left."""
    ids = np.asarray(token_ids.cpu() if hasattr(token_ids, "cpu") else token_ids)
    if ids.ndim != 2 or not ids.shape[0]:
        raise InvalidInput(f"a batch is [prompts, tokens], not of shape {ids.shape}")
    if attention_mask is None:
        return [(row, 0) for row in ids]
    given = attention_mask.cpu() if hasattr(attention_mask, "cpu") else attention_mask
    mask = np.asarray(given).astype(bool)
    if mask.shape != ids.shape or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise InvalidInput("the attention mask must be 0 on the left of each prompt and 1 on it")
    pads = (~mask).sum(axis=1).tolist()
    return [(row[pad:], pad) for row, pad in zip(ids, pads, strict=True)]


def _check_layers(layers: Any) -> None:
    """Raise InvalidInput unless every layer keeps keys and values of all tokens, as they are."""
    from transformers.cache_utils import DynamicLayer, StaticLayer  # noqa: PLC0415 - see layout_of

    odd = {
        type(layer).__name__ for layer in layers if type(layer) not in {DynamicLayer, StaticLayer}
    }
    if odd:
        raise InvalidInput(
            f"a cache with {', '.join(sorted(odd))}: only DynamicCache and StaticCache, of full "
            "attention in every layer, can be kept"
        )


def _empty_cache(into: Any) -> Any:
    """Return *into* if it is an empty cache of a known kind; a DynamicCache if there is none."""
    from transformers import DynamicCache  # noqa: PLC0415 - see layout_of

    if into is None:
        return DynamicCache()
    _check_layers(into.layers)
    if int(into.get_seq_length()):
        raise InvalidInput(f"the cache to load into has {int(into.get_seq_length())} tokens in it")
    return into


def _fill(cache: Any, tensors: "list[torch.Tensor]") -> None:
    """Put K and V of every layer into an empty *cache*; InvalidInput if they do not fit."""
    from transformers.cache_utils import StaticLayer  # noqa: PLC0415 - see layout_of

    length = tensors[0].shape[2]
    if any(
        isinstance(layer, StaticLayer) and layer.max_cache_len < length for layer in cache.layers
    ):
        raise InvalidInput(f"{length} tokens are held: make the static cache larger")
    for layer in range(len(tensors) // 2):
        keys, values = tensors[2 * layer], tensors[2 * layer + 1]
        if layer < len(cache.layers) and isinstance(cache.layers[layer], StaticLayer):
            cache.update(keys, values, layer)
        else:
            cache.update(keys[:, :, :0], values[:, :, :0], layer)  # makes the layer
            cache.layers[layer].keys, cache.layers[layer].values = keys, values  # uncopied


def _tensors_of(
    past_key_values: Any, group: Group, dtype: "torch.dtype", *, rows: int
) -> "list[torch.Tensor]":
    """Return K and V of every layer, [rows, heads, tokens, dim]; InvalidInput on other shapes."""
    layers = past_key_values.layers
    if not layers or not layers[0].is_initialized:
        return []
    _check_layers(layers)
    if len(layers) != group.layers:
        raise InvalidInput(
            f"{len(layers)} layers of KV; this model has {group.layers} layers of full attention"
        )
    length = int(past_key_values.get_seq_length())
    tensors = [tensor[:, :, :length] for layer in layers for tensor in (layer.keys, layer.values)]
    wanted = (rows, group.kv_heads, length, group.head_size)
    for tensor in tensors:
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
            raise InvalidInput(
                f"KV of shape {tuple(tensor.shape)} and {tensor.dtype}; this model needs {wanted} "
                f"for {rows} prompts and {dtype}"
            )
    return tensors


def _pieces(
    tensors: "list[torch.Tensor]", start: int, stop: int, *, by_head: bool
) -> "list[torch.Tensor]":
    """Return tokens *start* up to *stop* of all *tensors* in payload order.

    Of one head they are a contiguous run, and nothing is copied before the arena; with so many
    heads that there would be too many pieces, a layer is made contiguous instead.
    """
    runs = [tensor[0, :, start:stop] for tensor in tensors]
    if by_head:
        return [head.contiguous() for run in runs for head in run.unbind()]
    return [run.contiguous() for run in runs]
