"""What vLLM's KV is, as a layout: all that changes the bytes of a block, and what is refused.

For vllm.py and vllm_tier.py; see identity.py for the weights.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from twfs.engines.identity import config_hash, name_of_model, revision_of_files
from twfs.errors import InvalidInput
from twfs.layout import DTYPE_BITS, LAYERS_MAX, Arrangement, Group, Layout

log = logging.getLogger("twfs.engines")

IDENTITY: Final = "twfs_identity"  # in the connector's extra config: what only vLLM's config says
BLOCK_TOKENS: Final = 256  # of a stored block, where nothing is configured
SMALL_BLOCK_BYTES: Final = 2 << 20  # below this a drive is kept busy with requests, not bytes


def prepare(vllm_config: Any, spec: tuple[str, str]) -> None:
    """Put our defaults and the model's identity where the *spec* finds them; refuse what cannot be.

    InvalidInput says what to change; it is raised at the engine's start and never later.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    extra = transfer.kv_connector_extra_config
    nodes = nodes_of(parallel)
    if nodes > 1:
        raise InvalidInput(
            f"one engine over {nodes} nodes: a warehouse is of one node, so its ranks "
            "would not find each other's shards; run one engine a node (data parallel)"
        )
    if transfer.kv_load_failure_policy != "recompute":
        raise InvalidInput(
            'a load that fails must be computed instead: set "kv_load_failure_policy": "recompute"'
            " in --kv-transfer-config"
        )
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        raise InvalidInput(
            f"--prefix-caching-hash-algo {algorithm}: names of stored blocks must be cryptographic;"
            " use sha256 or sha256_cbor"
        )
    if "block_size" not in extra and "blocks_per_chunk" not in extra:
        extra["blocks_per_chunk"] = max(1, BLOCK_TOKENS // vllm_config.cache_config.block_size)
    extra.setdefault("offload_prompt_only", False)
    extra.setdefault("spec_name", spec[0])
    extra.setdefault("spec_module_path", spec[1])
    extra[IDENTITY] = identity_of(vllm_config, extra)


def nodes_of(parallel: Any) -> int:
    """On how many nodes an engine's ranks are; under Ray its group of places says so."""
    if parallel.placement_group is None:
        return int(parallel.nnodes_within_dp)
    import ray  # noqa: PLC0415 - the engine that calls has imported it
    from ray.util import placement_group_table  # noqa: PLC0415

    places = placement_group_table(parallel.placement_group)["bundles_to_node_id"]
    return len({ray.get_runtime_context().get_node_id(), *places.values()})


def check_windows(kv_cache_config: Any) -> None:
    """Refuse a model whose one group of layers drops what has left its window, or keeps states.

    vLLM 0.32 tells the spec of no window. Of several groups `layout_of` says what is wrong.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: PLC0415 - see identity_of

    groups = kv_cache_config.kv_cache_groups
    specs = [] if len(groups) != 1 else [groups[0].kv_cache_spec]
    for spec in specs:
        for each in getattr(spec, "kv_cache_specs", {"": spec}).values():
            if not isinstance(each, FullAttentionSpec):
                raise InvalidInput(
                    f"a model with {type(each).__name__} (sliding windows in all layers, or "
                    "states): only full attention is kept"
                )


def identity_of(vllm_config: Any, extra: Mapping[str, Any]) -> dict[str, str]:
    """Return what names the weights and how they are run, JSON-ready."""
    import vllm  # noqa: PLC0415 - the engine that calls has imported it
    from vllm.platforms import current_platform  # noqa: PLC0415

    model = vllm_config.model_config
    draft = getattr(vllm_config.speculative_config, "model", None)
    return {
        "revision": str(extra.get("revision") or revision_of(model.model, model.revision)),
        "config": config_hash(model.hf_config.to_dict()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization),
        "kv_scales": str(getattr(vllm_config.cache_config, "calculate_kv_scales", False)),
        "draft": "" if draft is None else f"{draft} {revision_of(draft, None)}",
        "hash": vllm_config.cache_config.prefix_caching_hash_algo,
        "vllm": ".".join(vllm.__version__.split(".")[:2]),
        "platform": str(current_platform.device_type),
        "attention": str(getattr(vllm_config.attention_config, "backend", None)),
        **_rarities(vllm_config),
    }


def _rarities(vllm_config: Any) -> dict[str, str]:
    """What else changes the bytes of KV, where it is not what it nearly always is."""
    from vllm import envs  # noqa: PLC0415 - see identity_of

    parallel, attention = vllm_config.parallel_config, vllm_config.attention_config
    plain = type(attention)(backend=attention.backend).compute_hash()
    contexts = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    found = {
        "attention_more": attention.compute_hash() != plain and attention.compute_hash(),
        "kv_unquantized": ",".join(vllm_config.cache_config.kv_cache_dtype_skip_layers),
        "interleave": contexts > 1 and parallel.cp_kv_cache_interleave_size,
        # A rank of a pipeline knows its own layers alone, so these are in no rank's layout.
        "pipeline": parallel.pipeline_parallel_size > 1 and envs.VLLM_PP_LAYER_PARTITION,
        "weights": vllm_config.load_config.load_format == "dummy" and "dummy",
    }
    return {name: str(value) for name, value in found.items() if value}


def revision_of(model: str, revision: str | None) -> str:
    """The revision of a model that is a path or a hub's name; InvalidInput if it is not there."""
    if Path(model).exists():
        return revision_of_files(model)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - vLLM has it

    try:
        return revision_of_files(snapshot_download(model, revision=revision, local_files_only=True))
    except OSError as error:
        raise InvalidInput(
            f'the revision of {model} is unknown: name it as "revision" in the extra config'
        ) from error


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout_of(config: Any, *, row_bytes: int | None = None) -> Layout:
    """Return the layout of an engine with this OffloadingConfig; InvalidInput if it has none.

    With *row_bytes* it is that of the CPU tier's rows, which hold all ranks' shares.
    """
    if len(config.groups) != 1 or config.canonical_layout:
        raise InvalidInput(
            f"{len(config.groups)} groups of layers that are cached differently (sliding windows, "
            "state spaces): vLLM cannot recompute a failed load of one of them; add "
            "--disable-hybrid-kv-cache-manager (and no canonical_layout), which keeps all layers "
            "alike"
        )
    (group,) = config.groups
    if getattr(group, "sliding_window_size_in_chunks", None) is not None:
        raise InvalidInput(
            "a model with sliding windows in all layers: only full attention is kept"
        )
    blocks, parallel = config.cache.blocks_per_chunk, config.parallel
    tokens = group.tokens_per_block * blocks
    payload_bytes = row_bytes or config.worker_kv_bytes_per_block * blocks
    if payload_bytes < SMALL_BLOCK_BYTES or tokens < BLOCK_TOKENS:
        log.warning(
            "twfs: blocks of %d tokens and %d bytes are small: block_size in the extra config of "
            "at least %d tokens and %d bytes a shard reads faster",
            tokens, payload_bytes, BLOCK_TOKENS, SMALL_BLOCK_BYTES,
        )  # fmt: skip
    layers = len(group.layer_names)
    whole = layers <= LAYERS_MAX and payload_bytes % layers == 0
    identity = dict(config.extra_config[IDENTITY])
    dtype = config.model.dtype if config.model.dtype in DTYPE_BITS else "uint8"
    return Layout(
        name_of_model(config.model.name),
        (
            Group(
                layers=layers if whole else 1, arrangement=Arrangement.OPAQUE, dtype=dtype,
                layer_bytes=payload_bytes // layers if whole else payload_bytes,
            ),
        ),
        tokens,
        revision=identity.pop("revision"),
        shards=1 if config.replicated_layout or row_bytes else parallel.world_size,
        replicated=config.replicated_layout,
        engine="vllm" if row_bytes is None else "vllm-cpu-tier",
        overrides={
            **identity,
            "kv_dtype": config.model.dtype,
            "kv_layout": str(config.kv_cache_layout),
            "blocks": f"{blocks} x {group.tokens_per_block}",
            "ranks": f"tp{parallel.tp_size} pp{parallel.pp_size} pcp{parallel.pcp_size} "
            f"dcp{parallel.dcp_size}",
            "layers": "" if parallel.pp_size > 1 else _short_hash("\0".join(group.layer_names)),
        },
    )  # fmt: skip
