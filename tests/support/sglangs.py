"""Drives SGLang processes (support.sglangengine) on a CPU, with the linker of docs/sglang.md."""

import json
from pathlib import Path
from typing import Any

from support.asking import Generating
from support.engines import engine_python
from support.snippets import snippets_of

PAGE_TOKENS = 64


def linker_config(socket: Path, **extra: Any) -> dict[str, Any]:
    """The page's configuration of the linker; patient on a busy machine."""
    config: dict[str, Any] = json.loads(snippets_of("sglang.md", "json")[0])
    assert "socket" in config["linker_extra_config"]
    config["linker_extra_config"] |= {
        "socket": str(socket), "timeout_s": 20.0, "patience_s": 20.0, **extra,
    }  # fmt: skip
    return config


class Sglang(Generating):
    """One engine process, driven as vLLM's; also a context manager."""

    def __init__(self, model: Path, linker: dict[str, Any], **options: Any) -> None:
        given = {
            "model_path": str(model), "device": "cpu", "attention_backend": "torch_native",
            "disable_overlap_schedule": True, "page_size": PAGE_TOKENS, "max_total_tokens": 20_000,
            "mem_fraction_static": 0.3, "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": linker, "log_level": "info",
            "skip_server_warmup": True, **options,
        }  # fmt: skip
        super().__init__(
            [engine_python("sglang"), "-m", "support.sglangengine", json.dumps(given)],
            SGLANG_USE_CPU_ENGINE="1",
        )
