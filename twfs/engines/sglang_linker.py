"""A UnifiedCacheLinker for SGLang (0.5.23): between its device pools and a warehouse, no host tier.

By default a load is staged and verified whole before SGLang may count on it, so that one that fails
is a recompute. With `layerwise` the first layer is released as soon as it is right; SGLang then
aborts the requests of a load that fails later. The configuration: docs/sglang.md.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)

from twfs.devices.arena import Arena
from twfs.engines.keyed import STORED, KeyedStore, Space
from twfs.engines.sglang import ENGINE, checked, key_of
from twfs.engines.sglang_weights import CurrentSpace, identity
from twfs.errors import DeviceError, InvalidInput
from twfs.hints import NO_HINT, Hint
from twfs.layout import Arrangement, Group, Layout
from twfs.store import LeasedMatch
from twfs.units import align_up

log = logging.getLogger(__name__)

READ_TIMEOUT_S: Final = 2.0  # that the scheduler may wait for a staged load: then it computes
PATIENCE_S: Final = 0.05  # that it may wait for an answer
SILENT_SECONDS: Final = 1.0  # without asking, after an answer that did not come
STAGING_BYTES: Final = 256 << 20  # of a staged load; what does not fit is computed


@dataclass(slots=True)
class _Load:
    """One request's load: its blocks' places in the pools, and where their bytes come from."""

    rows: Any  # the first slot of each block, on the device or not
    match: LeasedMatch
    blocks: int
    staged: Any = None  # [blocks, layers, bytes], verified; None: read layer by layer


class TwfsLinker(UnifiedCacheLinker):
    """See the module's docstring.

    Its extra config: `socket` of the daemon; `tenant`; `revision`, the directory of the weights or
    what else tells them; `timeout_s` of loads; `patience_s` for answers; `keep_on_flush`: a flush
    of SGLang's is no update of weights; `layerwise`; `staging_bytes`. InvalidInput for pools that
    cannot be kept.
    """

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any = None,
        forward_stream: Any = None,
    ) -> None:  # fmt: skip
        extra = checked(extra_config, "layerwise", "staging_bytes")
        self.forward_stream = forward_stream
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self._layers = layers_of(pool, params, components)
        self._on_gpu = bool(self._layers[0][0].is_cuda)
        self._block_tokens = int(params.page_size)
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(len(self._layers))
        pool.register_layer_transfer_counter(self.layer_done_counter)
        self._layerwise = bool(extra.get("layerwise", False))
        self._timeout_s = float(extra.get("timeout_s", READ_TIMEOUT_S))
        self._patience_s = float(extra.get("patience_s", PATIENCE_S))
        self._store = KeyedStore(ENGINE, extra["socket"], patience_s=self._patience_s)
        layout = partial(self._layout, server_args, params)
        self._current = CurrentSpace(self._store, layout, extra)
        self._block_bytes = self._current.now().layout.block_bytes()
        self._staging = Arena.private(int(extra.get("staging_bytes", STAGING_BYTES)))
        self._silent_until_s = 0.0  # the daemon does not answer, so it is not asked
        self._queued: dict[str, _Load] = {}
        self._loading: dict[int, Future[None]] = {}
        self._offloaded: deque[bool] = deque()
        self._under_way: set[Future[None]] = set()
        self._guard = threading.Lock()
        self._loaders = ThreadPoolExecutor(1, "twfs-linker")
        self._storers = ThreadPoolExecutor(1, "twfs-linker-put")
        log.info("twfs: SGLang's KV is kept in the warehouse behind %s", extra["socket"])

    def _layout(self, server_args: Any, params: Any, revision: str) -> Layout:
        first = self._layers[0]
        layer_bytes = sum(row_bytes(tensor) for tensor in first) * self._block_tokens
        group = Group(
            len(self._layers), arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=layer_bytes
        )
        return Layout(
            server_args.model_path, (group,), self._block_tokens, revision=revision, engine=ENGINE,
            overrides={
                **identity(),
                "pool_dtype": ";".join(str(tensor.dtype) for tensor in first),
                "arrangement": "device",
                "shape": ";".join("x".join(map(str, tensor.shape[1:])) for tensor in first),
                "ranks": f"tp{tp_rank(params)}of{server_args.tp_size} "
                f"pp{params.pp_rank}of{params.pp_size} "
                f"cp{params.attn_cp_rank}of{params.attn_cp_size}",
            },
        )  # fmt: skip

    def _pieces(self, row: int, layers: range) -> list[Any]:
        """The memory of the block that begins at slot *row*, layer by layer."""
        stop = row + self._block_tokens
        return [tensor[row:stop] for layer in layers for tensor in self._layers[layer]]

    # Lookup and load

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """See UnifiedCacheLinker: every prefix up to what is there."""
        del rid
        look = partial(self._lookup, transfers)
        return list(range(1, 1 + self._store.quietly("a lookup failed", look, 0)))

    def _lookup(self, transfers: list[Any]) -> int:
        """How many blocks are there; 0 without a question as long as nobody answers."""
        keys = [key_of(key) for key in kv_of(transfers).keys]
        self._store.places.follow(keys, self._block_tokens)
        begun_s = time.monotonic()
        if begun_s < self._silent_until_s:
            return 0
        found = self._current.now().lookup(keys)
        if not found and time.monotonic() - begun_s > self._patience_s:
            self._silent_until_s = time.monotonic() + SILENT_SECONDS
        return found

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """See UnifiedCacheLinker: False, and so a recompute, unless all is held (and staged).

        SGLang's scheduler ends with what is raised here, so nothing is.
        """
        queue = partial(self._load, rid, transfers)
        return self._store.quietly("a load failed", queue, default=False)

    def _load(self, rid: str, transfers: list[Any]) -> bool:
        transfer = kv_of(transfers)
        keys = [key_of(key) for key in transfer.keys]
        match = self._current.now().match(keys)
        if match is None:
            return False
        try:
            rows = transfer.device_indices.reshape(-1, self._block_tokens)[:, 0]
            load = _Load(rows, match, len(keys))
            if match.blocks == len(keys) and (self._layerwise or self._stage(load)):
                self._queued[rid] = load
        finally:
            if rid not in self._queued:
                match.release()
        return rid in self._queued

    def _stage(self, load: _Load) -> bool:
        """Read all of *load* and verify it, within the timeout; False if that fails."""
        step = align_up(self._block_bytes)
        needed = load.blocks * step
        fits = needed <= self._staging.byte_count
        piece = self._staging.take(needed, timeout_s=0) if fits else None
        if piece is None:
            self._store.complain("a load was not staged", f"it wants {needed} of staging_bytes")
            return False
        try:
            flat = torch.frombuffer(piece.view, dtype=torch.uint8).view(load.blocks, step)
            payload = flat[:, : self._block_bytes]
            report = load.match.read_into(list(payload.unbind()), timeout_s=self._timeout_s)
            if report.blocks == load.blocks:
                load.staged = (piece, payload.view(load.blocks, len(self._layers), -1))
            else:
                self._store.complain("a load was short", report.outcomes[report.blocks])
        finally:
            if load.staged is None:
                piece.release()
        return load.staged is not None

    def cancel_queued_load(self, rid: str) -> bool:
        """See UnifiedCacheLinker."""
        load = self._queued.pop(rid, None)
        if load is not None:
            self._let_go(load)
        return load is not None

    def _let_go(self, load: _Load) -> None:
        if load.staged is not None:
            load.staged[0].release()
        load.match.release()

    def start_layer_wise_loading(self) -> int:
        """See UnifiedCacheLinker."""
        if not self._queued:
            return -1
        loads, self._queued = list(self._queued.values()), {}
        index: int = self.layer_done_counter.update_producer()
        self._loading[index] = self._loaders.submit(self._do_load, index, loads)
        return index

    def _do_load(self, index: int, loads: list[_Load]) -> None:
        """Fill the pools, and release layer after layer; a failure fails all that are left."""
        try:
            rows = [load.rows.tolist() for load in loads]
            for layers in self._portions():
                for load, slots in zip(loads, rows, strict=True):
                    self._fill(load, slots, layers)
                if self._on_gpu:  # the forward is on another stream
                    torch.cuda.current_stream().synchronize()
                for layer in layers:
                    self.layer_done_counter.complete(index, layer)
        except Exception as error:  # noqa: BLE001 - SGLang aborts the requests, and goes on
            self._store.complain("a load failed half-way", error)
            self.layer_done_counter.fail(index, error)
        finally:
            for load in loads:
                self._let_go(load)

    def _portions(self) -> Iterator[range]:
        """The layers to release at once: one of what is staged, else more and more."""
        at, width = 0, 1
        while at < len(self._layers):
            stop = min(at + width, len(self._layers))
            yield range(at, stop)
            at, width = stop, width * 2 if self._layerwise else 1

    def _fill(self, load: _Load, rows: list[int], layers: range) -> None:
        """Put *layers* of all blocks where the forward reads them. DeviceError."""
        if load.staged is None:
            into = [self._pieces(row, layers) for row in rows]
            report = load.match.read_into(into, layers=layers, timeout_s=self._timeout_s)
            if report.blocks < load.blocks:
                raise DeviceError(f"block {report.blocks}: {report.outcomes[report.blocks]}")
            return
        for row, block in zip(rows, load.staged[1], strict=True):
            for layer in layers:
                at = 0
                for tensor in self._layers[layer]:
                    part = tensor[row : row + self._block_tokens]
                    stop = at + part.numel() * part.element_size()
                    part.copy_(block[layer, at:stop].view(tensor.dtype).view(part.shape))
                    at = stop

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """See UnifiedCacheLinker."""
        landed = bool(self.layer_done_counter.finish(counter_index))
        loading = self._loading.pop(counter_index, None)
        if loading is not None:
            loading.result()
        return landed

    # Offload

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """See UnifiedCacheLinker."""
        queue = partial(self._offload, transfers, session_id)
        return self._store.quietly("a store failed", queue, default=False)

    def _offload(self, transfers: list[Any], session_id: str | None) -> bool:
        transfer, space = kv_of(transfers), self._current.now()
        events = self.record_offload_ready() if self.forward_stream is not None else []
        self._submit(lambda: self._do_offload(space, transfer, events, session_id))
        return True

    def _submit(self, work: Callable[[], bool]) -> None:
        """Have an offload done; its result follows those before it."""

        def run() -> None:
            done = self._store.quietly("a store failed", work, default=False)
            with self._guard:
                self._offloaded.append(done)

        future = self._storers.submit(run)
        with self._guard:
            self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)

    def _do_offload(
        self, space: Space, transfer: Any, events: Sequence[Any], session_id: str | None
    ) -> bool:
        for event in events:
            event.synchronize()
        keys = [key_of(key) for key in transfer.keys]
        self._store.places.follow(keys, self._block_tokens)
        rows = transfer.device_indices.reshape(-1, self._block_tokens)[:, 0].tolist()
        layers = range(len(self._layers))
        payloads = [self._pieces(row, layers) for row in rows]
        hint = self._store.quietly("a session's id", lambda: Hint(session_id or ""), NO_HINT)
        return STORED.issuperset(space.put(keys, payloads, hint))

    def num_completed_offloads(self) -> int:
        """See UnifiedCacheLinker."""
        return len(self._offloaded)

    def pop_completed_offload(self) -> bool:
        """See UnifiedCacheLinker."""
        with self._guard:
            return self._offloaded.popleft()

    # The end

    def reset(self) -> None:
        """See UnifiedCacheLinker: SGLang calls this for new weights too, and does not say so."""
        self._quiesce()
        self._current.flushed()

    def _quiesce(self) -> None:
        """Let go of what is queued, and wait for all transfers."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for future in [*self._loading.values(), *list(self._under_way)]:
            future.result()
        self._loading.clear()
        self._offloaded.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """See UnifiedCacheLinker."""
        self._quiesce()
        self._loaders.shutdown()
        self._storers.shutdown()
        self._store.close()
        self._staging.close()


def kv_of(transfers: Sequence[Any]) -> Any:
    """The transfer of the KV pool, the only one that there is."""
    return next(transfer for transfer in transfers if transfer.name == PoolName.KV)


def row_bytes(tensor: Any) -> int:
    """Bytes of one token in one layer of a pool."""
    return int(tensor.stride(0) * tensor.element_size())


def layers_of(pool: Any, params: Any, components: Any) -> list[list[Any]]:
    """The tensors of each layer, token by token: K and V, or the latent of MLA.

    InvalidInput for models that have anything else beside.
    """
    kinds = {component.name for component in components}
    drafts = (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools)
    if kinds != {"FULL"} or drafts:
        raise InvalidInput(
            f"this model caches {sorted(kinds)}{' and a draft model' if drafts else ''}: twfs "
            "keeps models of full attention only"
        )
    if hasattr(pool, "k_buffer"):
        layers = [[k, v] for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)]
    elif hasattr(pool, "kv_buffer"):
        layers = [[latent] for latent in pool.kv_buffer]
    else:
        raise InvalidInput(f"KV in a {type(pool).__name__} is not known")
    if not all(tensor.is_contiguous() for layer in layers for tensor in layer):
        raise InvalidInput(f"KV in a {type(pool).__name__} that is not contiguous")
    return layers


def tp_rank(params: Any) -> int:
    """The place of this process among those that share a model's heads."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank(group=group))
    return 0
