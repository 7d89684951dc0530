"""Which weights SGLang computes with: what its KV may be mixed with, and what it must not be.

For sglang.py and sglang_linker.py. SGLang tells a cache of no new weights: it empties it, and says
where weights were read from, or their version, if it was told one. So what follows an emptied
cache is a model of this process alone, in a new epoch each time: neither an engine that still has
the old weights nor one that starts with them finds it.
"""

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import sglang
from sglang.srt.runtime_context import get_exec, get_model, get_parallel, get_serving

from twfs.engines.identity import config_hash
from twfs.engines.keyed import KeyedStore, Revisions, Space
from twfs.errors import InvalidInput
from twfs.layout import Layout

log = logging.getLogger(__name__)

# Of SGLang's options those that change what a model computes, or how.
OPTIONS: Final = (
    "dtype", "kv_cache_dtype", "quantization", "json_model_override_args", "model_impl",
    "load_format",
)  # fmt: skip


def identity() -> dict[str, str]:
    """All beside shapes and ranks that makes KV differ, as SGLang is configured."""
    model = get_model()
    config, scales = Path(model.model_path) / "config.json", model.quantization_param_path
    return {
        "sglang": str(sglang.__version__),
        "attention": str(get_exec().kernel.attention_backend),
        "config": config_hash(json.loads(config.read_bytes())) if config.is_file() else "",
        "kv_scales": hashlib.sha256(Path(scales).read_bytes()).hexdigest()[:16] if scales else "",
        **{name: str(getattr(model, name)) for name in OPTIONS},
    }


def check_nodes() -> None:
    """InvalidInput where the ranks of one engine are on several nodes."""
    if (nodes := int(get_parallel().nnodes)) > 1:
        raise InvalidInput(
            f"one engine over {nodes} nodes (--nnodes): a warehouse is of one node, so its ranks "
            "would not find each other's shards; run one engine a node"
        )


def said() -> tuple[str, str]:
    """What SGLang says now of its weights: where they were read last, and their version."""
    return str(get_model().model_path), str(get_serving().weight_version)


class CurrentSpace:
    """The space of KV of the weights that the engine has now; see the module's docstring.

    *layout* makes the layout of a revision; *extra* is the adapter's config. InvalidInput if
    nothing tells the weights, or for several nodes. Thread-safe.
    """

    def __init__(
        self, store: KeyedStore, layout: Callable[[str], Layout], extra: Mapping[str, Any]
    ) -> None:
        check_nodes()
        self._store = store
        self._layout = layout
        self._tenant = extra.get("tenant")
        self._kept = bool(extra.get("keep_on_flush", False))
        self._said = said()
        path = self._said[0]
        self._revision = Revisions({path: extra.get("revision", "")}).of(path)
        self._mixed = False  # new weights, and no flush yet: what comes may be of the old ones
        self._lock = threading.Lock()
        self._own = ""  # which model of this process; empty as long as it is that of the files
        self._space = store.space(layout(self._revision), self._tenant)

    def now(self) -> Space:
        """Where to look, and where what is computed from now on goes."""
        if said() != self._said:
            self.renew()
            self._mixed = True
        return self._space

    def flushed(self) -> None:
        """SGLang has emptied its cache: weights are new, unless the config says otherwise."""
        if not self._kept or self._mixed or said() != self._said:
            self.renew()
            self._mixed = False

    def renew(self) -> None:
        """Let nothing stored until now hit."""
        with self._lock:
            self._said = said()
            if self._own and self._space.renew():
                return
            self._own = secrets.token_hex(8)
            layout = self._layout(f"{self._revision} then {self._own}")
            self._space = self._store.space(layout, self._tenant)
        log.info("twfs: the cache was emptied: what follows is stored for this engine alone")
