"""The layouts of one model as vLLM would run it in many ways, each by vLLM's own code.

`python -m support.vllmlayouts MODEL OTHER` runs in the engine's environment; both are directories
of models. Prints the names of CHANGES and SAME with the fingerprints of their layouts, as JSON.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

BLOCK_TOKENS: Final = 64


class Made:
    """An engine's configuration, to be changed."""

    def __init__(self, model: str) -> None:
        import torch
        import vllm
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        made: Any = EngineArgs
        self.config = made(
            model=model, dtype="bfloat16", block_size=BLOCK_TOKENS, enforce_eager=True,
            disable_hybrid_kv_cache_manager=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector="TwfsConnector", kv_connector_module_path="twfs.engines.vllm",
                kv_role="kv_both", kv_load_failure_policy="recompute",
                kv_connector_extra_config={"socket": "none", "block_size": 256},
            ),
        ).create_engine_config()  # fmt: skip
        kind: Any = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=64, dtype=torch.bfloat16
        )
        self.layers = ["layers.0", "layers.1"]
        self.cache: Callable[[list[str]], Any] = lambda layers: KVCacheConfig(
            8, [], [KVCacheGroupSpec(layers, kind)]
        )
        self.version: str = vllm.__version__
        self.platform: str = current_platform.device_type
        self.environment: dict[str, str] = {}

    @property
    def extra(self) -> dict[str, Any]:
        """The connector's own configuration."""
        extra: dict[str, Any] = self.config.kv_transfer_config.kv_connector_extra_config
        return extra

    def fingerprint(self) -> str:
        """Of the layout that a rank makes of it."""
        import vllm
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
            build_offloading_config,
        )
        from vllm.platforms import current_platform

        from twfs.engines.vllm_layout import layout_of, prepare

        with (
            patch.object(vllm, "__version__", self.version),
            patch.object(current_platform, "device_type", self.platform),
            patch.dict(os.environ, self.environment),
        ):
            prepare(self.config, ("TwfsSpec", "twfs.engines.vllm"))
            cache: Any = self.cache(self.layers)
            config = build_offloading_config(self.config, cache)
            return layout_of(config).fingerprint.hex()


def put(path: str, value: Any) -> Callable[[Made], None]:
    """Give a field of the configuration another value."""

    def change(made: Made) -> None:
        *parts, name = path.split(".")
        owner: Any = made.config
        for part in parts:
            owner = getattr(owner, part)
        object.__setattr__(owner, name, value)

    return change


def also(*changes: Callable[[Made], None]) -> Callable[[Made], None]:
    """Some changes at once."""

    def change(made: Made) -> None:
        for each in changes:
            each(made)

    return change


def parallel(world: int, **sizes: int) -> Callable[[Made], None]:
    """Ranks, by what they divide."""
    named = [put(f"parallel_config.{name}_parallel_size", size) for name, size in sizes.items()]
    return also(put("parallel_config.world_size", world), *named)


def option(name: str, value: Any) -> Callable[[Made], None]:
    """An option of the connector."""
    return lambda made: made.extra.update({name: value})


def own(name: str, value: Any) -> Callable[[Made], None]:
    """What no field of the configuration says."""
    return lambda made: setattr(made, name, value)


def rope(made: Made) -> None:
    """As --hf-overrides does."""
    made.config.model_config.hf_config.rope_scaling = {"rope_type": "linear", "factor": 2.0}


def backend(made: Made) -> None:
    """As --attention-backend does."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    made.config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN


def draft(made: Made) -> None:
    """A draft model beside it."""
    made.config.speculative_config = SimpleNamespace(model=OTHER)


MODEL, OTHER = sys.argv[1:] if __name__ == "__main__" else ("", "")
PIPELINE: Final = parallel(2, pipeline=2)
CONTEXTS: Final = parallel(2, tensor=2, decode_context=2)
# Each changes what the bytes of a block are, or whose they are.
CHANGES: Final[dict[str, Callable[[Made], None]]] = {
    "revision": option("revision", "other"),
    "weights": put("model_config.model", OTHER),
    "dummy weights": put("load_config.load_format", "dummy"),
    "overrides of the config": rope,
    "dtype": put("model_config.dtype", "float32"),
    "quantization": put("model_config.quantization", "fp8"),
    "KV dtype": put("cache_config.cache_dtype", "fp8"),
    "layers whose KV is not quantized": put("cache_config.kv_cache_dtype_skip_layers", ["1"]),
    "KV scales": put("cache_config.calculate_kv_scales", True),
    "attention backend": backend,
    "other attention": put("attention_config.use_non_causal", True),
    "KV layout": put("cache_config.kv_cache_layout", "BLHNC"),
    "stored block": option("block_size", 512),
    "hash": put("cache_config.prefix_caching_hash_algo", "sha256_cbor"),
    "draft model": draft,
    "layers": own("layers", ["layers.0", "layers.7"]),
    "tensor parallel": parallel(2, tensor=2),
    "pipeline": PIPELINE,
    "parts of a pipeline": also(PIPELINE, own("environment", {"VLLM_PP_LAYER_PARTITION": "1,1"})),
    "context parallel": CONTEXTS,
    "interleaved contexts": also(CONTEXTS, put("parallel_config.cp_kv_cache_interleave_size", 8)),
    "platform": own("platform", "other"),
    "version": own("version", "0.99.1"),
}
# And these do not, each beside the one that it is the same as.
SAME: Final[dict[str, tuple[str, Callable[[Made], None]]]] = {
    "another rank": (
        "tensor parallel",
        also(parallel(2, tensor=2), put("parallel_config.rank", 1)),
    ),
    "another stage": ("pipeline", also(PIPELINE, own("layers", ["layers.2", "layers.3"]))),
    "another engine": ("", put("kv_transfer_config.engine_id", "other")),
    "another replica": ("", put("parallel_config.data_parallel_index", 1)),
    "another daemon": ("", option("socket", "elsewhere")),
    "memory": ("", put("cache_config.gpu_memory_utilization", 0.1)),
}


def main() -> None:
    """Print them all."""
    base, found = Made(MODEL), {}
    changes = {"": also()} | CHANGES | {name: change for name, (_, change) in SAME.items()}
    for name, change in changes.items():
        made = copy.copy(base)
        made.config = copy.deepcopy(base.config)
        change(made)
        found[name] = made.fingerprint()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
