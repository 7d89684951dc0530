"""vLLM's own `fs` tier, unmodified, with its directory under /files.

It hits after a restart, and computes what is lost: bytes that changed on the device, blocks that
cannot be read, a mount that has died. The tier calls a file that it cannot read a miss, and keeps
what it read before it in the same job (vllm/v1/kv_offload/tiering/fs/manager.py).
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from support.filefaults import faulty_files
from support.lostfiles import (
    BLOCKS,
    HELD,
    TOKENS,
    Served,
    test_a_file_that_is_lost_is_computed_again,  # noqa: F401 - what this module claims as well
    test_a_mount_killed_during_a_load_costs_that_load,  # noqa: F401
    until_blocks,
)
from support.mounting import mounted
from support.snippets import settings_of
from support.vllms import GPU_BLOCK_TOKENS, STORED_TOKENS, Vllm

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(900)]  # fmt: skip

SUFFIX: Final = ".bin"


def tier_config(directory: Path) -> dict[str, Any]:
    """VLLM's tiers as docs/files.md says; the worker of the CPU platform is support.vllmtier's."""
    (setting,) = settings_of("files.md", "vLLM, `TieringOffloadingSpec`")
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec", "spec_module_path": "support.vllmtier",
            "cpu_bytes_to_use": 256 << 20, "block_size": STORED_TOKENS,
            **json.loads(f"{{{setting}}}".replace("/tw/files/cache", str(directory))),
        },
    }  # fmt: skip


def test_the_fs_tier_finds_its_files_after_a_restart(
    model: Path, scratch: Path, tmp_path: Path
) -> None:
    prompt = {"seed": 1, "tokens": TOKENS}
    with mounted(scratch, tmp_path / "mnt") as mount:
        directory = mount.path / "files/kv"
        directory.mkdir()
        with Vllm("vllm", model, tier_config(directory)) as vllm:
            cold = vllm.generate(prompt, out=8)
            assert cold["cached"] == [0]
            until_blocks(directory, SUFFIX, BLOCKS)
    with mounted(scratch, tmp_path / "mnt") as mount:
        assert not list(directory.rglob("*.tmp"))
        with Vllm("vllm", model, tier_config(directory)) as vllm:
            warm = vllm.generate(prompt, out=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [HELD]
        assert mount.statistics()["counters"]["mount_reads"] >= BLOCKS
        assert GPU_BLOCK_TOKENS < STORED_TOKENS


def forget(vllm: Vllm) -> None:
    """Empty the engine's own memory and the tier's."""
    assert vllm.ask(do="reset", connector=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Served]:
    with (
        faulty_files(tmp_path_factory.mktemp("served")) as files,
        Vllm("vllm", model, tier_config(files.directory)) as vllm,
    ):
        yield Served(files, vllm, SUFFIX, partial(forget, vllm))
