"""A HiCacheStorage for SGLang (0.5.23): the third tier of its hierarchical cache is a warehouse.

Blocks are SGLang's own, read and written where its host pool has them (`interface_v1`); it says
itself what is before them (`hicache_storage_pass_prefix_keys`). The configuration: docs/sglang.md.
"""

import ctypes
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
)

from twfs.engines.keyed import PATIENCE_S, READ_TIMEOUT_S, STORED, KeyedStore, Space
from twfs.engines.sglang_weights import CurrentSpace, identity
from twfs.errors import InvalidInput
from twfs.layout import Arrangement, Group, Layout

log = logging.getLogger(__name__)

ENGINE: Final = "sglang"
# What SGLang itself reads in the same mapping, and what is ours.
SGLANGS: Final = frozenset({"backend_name", "module_path", "class_name", "interface_v1"})
OURS: Final = frozenset(
    {"socket", "tenant", "revision", "timeout_s", "patience_s", "keep_on_flush"}
)


def key_of(text: str) -> bytes:
    """The bytes of a key of SGLang's: SHA-256 in hex, as a rule."""
    try:
        return bytes.fromhex(text) if len(text) == 64 else hashlib.sha256(text.encode()).digest()
    except ValueError:
        return hashlib.sha256(text.encode()).digest()


def checked(given: Mapping[str, Any] | None, *others: str) -> dict[str, Any]:
    """Return our part of an extra config. InvalidInput: no socket, or what is not known."""
    found = {name: value for name, value in (given or {}).items() if name not in SGLANGS}
    if unknown := set(found) - OURS - set(others):
        raise InvalidInput(f"the extra config has {sorted(unknown)}: twfs knows {sorted(OURS)}")
    if "socket" not in found:
        raise InvalidInput("the extra config names no `socket`: give the daemon's")
    return found


def pool_layout(config: HiCacheStorageConfig, pool: Any, block_bytes: int, revision: str) -> Layout:
    """The layout of a host pool's blocks: all that SGLang tells of them is in its fingerprint."""
    rank = "" if config.is_mla_model else f"tp{config.tp_rank}of{config.tp_size} "
    return Layout(
        config.model_name or "model",
        (Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=block_bytes),),
        pool.page_size, revision=revision, engine=ENGINE,
        overrides={
            **identity(), "pool_dtype": str(pool.dtype), "arrangement": str(pool.layout),
            "layers": f"{pool.start_layer} to {pool.end_layer}", "heads": str(pool.head_num),
            "ranks": f"{rank}pp{config.pp_rank}of{config.pp_size} "
            f"cp{config.attn_cp_rank}of{config.attn_cp_size} "
            f"dcp{config.dcp_rank}of{config.dcp_size}",
        },
    )  # fmt: skip


class TwfsHiCache(HiCacheStorage):
    """See the module's docstring.

    Its extra config: `socket` of the daemon; `tenant`; `revision`, the directory of the weights or
    what else tells them, where SGLang was given no directory; `timeout_s` of reads;
    `patience_s` for answers; `keep_on_flush`: a flush of SGLang's is no update of weights.
    """

    def __init__(self, config: HiCacheStorageConfig, given: Any = None) -> None:
        del given
        extra = checked(config.extra_config)
        if not (config.extra_config or {}).get("interface_v1"):
            raise InvalidInput(
                'set "interface_v1": 1 in the extra config: blocks are not copied then'
            )
        self._config = config
        self._extra = extra
        patience_s = float(extra.get("patience_s", PATIENCE_S))
        self._store = KeyedStore(ENGINE, extra["socket"], patience_s=patience_s)
        self._current: CurrentSpace | None = None
        self._timeout_s: float | None = extra.get("timeout_s", READ_TIMEOUT_S)
        log.info("twfs: HiCache's storage is the warehouse behind %s", extra["socket"])

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """See HiCacheStorage; InvalidInput, which ends the start, for what cannot be kept."""
        super().register_mem_pool_host(mem_pool_host)
        import torch  # noqa: PLC0415 - SGLang has imported it

        _, sizes = mem_pool_host.get_page_buffer_meta(torch.arange(mem_pool_host.page_size))
        layout = partial(pool_layout, self._config, mem_pool_host, sum(sizes))
        self._current = CurrentSpace(self._store, layout, self._extra)
        self._follow(mem_pool_host, self._current)

    def _follow(self, pool: Any, current: CurrentSpace) -> None:
        """Hear of it when *pool* is emptied: SGLang does that in each flush, and tells us not."""
        clear = pool.clear

        def emptied() -> None:
            clear()
            current.flushed()

        pool.clear = emptied

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """See HiCacheStorage; only the KV pool itself can be kept. InvalidInput."""
        if host_pool is not getattr(self, "mem_pool_host", None):
            raise InvalidInput(
                f"this model has a pool {host_pool_name} beside its KV (hybrid, sliding or draft): "
                "twfs keeps models of full attention only"
            )

    def _memory(self, host_indices: Any, count: int) -> list[list[memoryview]]:
        """The pieces of *count* blocks in the host pool."""
        places, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        pieces = [
            memoryview((ctypes.c_char * size).from_address(place)).cast("B")
            for place, size in zip(places, sizes, strict=True)
        ]
        each = len(pieces) // count
        return [pieces[at : at + each] for at in range(0, len(pieces), each)]

    def _keys(
        self, keys: Sequence[str], extra_info: HiCacheStorageExtraInfo | None
    ) -> tuple[Space, list[bytes], int]:
        """Where blocks are, the keys from the sequence's first on, and how many are before."""
        assert self._current is not None
        space = self._current.now()
        before = [key_of(key) for key in getattr(extra_info, "prefix_keys", None) or ()]
        chain = before + [key_of(key) for key in keys]
        self._store.places.learn(chain[len(before) :], space.layout.block_tokens, before)
        return space, chain, len(before)

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """See HiCacheStorage; counts a use of what is there, and of what is before it."""
        space, chain, before = self._keys(keys, extra_info)
        found = space.lookup(chain, start=before)
        if found > before:
            space.touch(chain[:found])
        return found - before

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """See HiCacheStorage."""
        space, chain, before = self._keys(keys, extra_info)
        into = self._memory(host_indices, len(keys))
        right = set(space.read(chain[before:], into, self._timeout_s))
        return [place in right for place in range(len(keys))]

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """See HiCacheStorage."""
        space, chain, before = self._keys(keys, extra_info)
        if not self._config.is_storage_writer:
            return [True] * len(keys)
        outcomes = space.put(chain[before:], self._memory(host_indices, len(keys)))
        return [outcome in STORED for outcome in outcomes]

    def exists(self, key: str) -> bool:
        """See HiCacheStorage."""
        return self.batch_exists([key]) == 1

    def _never(self, *_: Any, **__: Any) -> None:
        """Of the copying interface, in whose place interface_v1 is."""

    get = batch_get = set = batch_set = _never

    def clear(self) -> None:
        """See HiCacheStorage: as if weights were new."""
        if self._current is not None:
            self._current.renew()

    def close(self) -> None:
        """End all I/O."""
        if self._current is not None:
            self.mem_pool_host.__dict__.pop("clear", None)  # see _follow
        self._store.close()
