"""Drives SGLang processes (support.sglangengine) on a CPU, with what docs/sglang.md says."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from support.asking import Generating
from support.engines import engine_python
from support.snippets import snippets_of

PAGE_TOKENS = 64  # as in the page's commands


def linker_config(socket: Path, **extra: Any) -> dict[str, Any]:
    """The page's configuration of the linker; patient on a busy machine.

    A flush empties the engine's own memory and nothing else, unless *extra* says so.
    """
    config: dict[str, Any] = json.loads(snippets_of("sglang.md", "json")[0])
    assert "socket" in config["linker_extra_config"]
    config["linker_extra_config"] |= {
        "socket": str(socket), "timeout_s": 20.0, "patience_s": 20.0, "keep_on_flush": True,
        **extra,
    }  # fmt: skip
    return config


def hicache_config(socket: Path, **extra: Any) -> dict[str, Any]:
    """The page's configuration of HiCache's storage, as linker_config."""
    config: dict[str, Any] = json.loads(snippets_of("sglang.md", "json")[1])
    assert "socket" in config
    patient = {"timeout_s": 20.0, "patience_s": 20.0, "keep_on_flush": True}
    return config | {"socket": str(socket)} | patient | extra


def command_of(config: dict[str, Any]) -> list[str]:
    """The words of the page's command for *config*, behind the module's name."""
    number, file = (1, "twfs-linker.json") if "linker" in config else (2, "twfs-hicache.json")
    command = snippets_of("sglang.md", "sh")[number].replace("\\\n", " ")
    words = shlex.split(command.replace(f'"$(cat {file})"', shlex.quote(json.dumps(config))))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    return words[3:]


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options of the page's command for *config*, as sglang.Engine takes them."""
    words = command_of(config)
    given: dict[str, Any] = {}
    for word, following in pairwise([*words, "--"]):
        if word.startswith("--"):
            value = True if following.startswith("--") else following
            given[word[2:].replace("-", "_")] = value
    given["page_size"] = int(given["page_size"])
    if "linker" in config:
        given["unified_cache_external_linker_config"] = config
    else:  # else it waits for some time only
        given["hicache_storage_prefetch_policy"] = "wait_complete"
    return given


class Sglang(Generating):
    """One engine process, driven as vLLM's; also a context manager."""

    def __init__(self, model: Path, config: dict[str, Any], **options: Any) -> None:
        given = {
            **options_of(config), "model_path": str(model), "device": "cpu",
            "attention_backend": "torch_native", "disable_overlap_schedule": True,
            "max_total_tokens": 20_000, "mem_fraction_static": 0.3, "log_level": "info",
            "skip_server_warmup": True, **options,
        }  # fmt: skip
        super().__init__(
            [engine_python("sglang"), "-m", "support.sglangengine", json.dumps(given)],
            SGLANG_USE_CPU_ENGINE="1", HOST_POOL_ON_CPU="" if "linker" in config else "1",
        )  # fmt: skip
