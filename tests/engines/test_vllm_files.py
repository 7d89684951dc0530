"""vLLM's own `fs` tier, unmodified, with its directory under /files: hits after a restart."""

import time
from pathlib import Path
from typing import Any, Final

import pytest

from support.mounting import mounted
from support.vllms import GPU_BLOCK_TOKENS, STORED_TOKENS, Vllm, random_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(900)]  # fmt: skip

TOKENS: Final = 2000
BLOCKS: Final = TOKENS // STORED_TOKENS


def tier_config(directory: Path) -> dict[str, Any]:
    """VLLM's tiers as docs/files.md says; the worker of the CPU platform is support.vllmtier's."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec", "spec_module_path": "support.vllmtier",
            "cpu_bytes_to_use": 256 << 20, "block_size": STORED_TOKENS,
            "secondary_tiers": [{"type": "fs", "root_dir": str(directory)}],
        },
    }  # fmt: skip


def files_in(directory: Path) -> list[Path]:
    """The tier's blocks."""
    return [path for path in directory.rglob("*") if path.is_file() and path.suffix == ".bin"]


def test_the_fs_tier_finds_its_files_after_a_restart(scratch: Path, tmp_path: Path) -> None:
    model = random_model("vllm", tmp_path / "model")
    prompt = {"seed": 1, "tokens": TOKENS}
    with mounted(scratch, tmp_path / "mnt") as mount:
        directory = mount.path / "files/kv"
        directory.mkdir()
        with Vllm("vllm", model, tier_config(directory)) as vllm:
            cold = vllm.generate(prompt, out=8)
            assert cold["cached"] == [0]
            while len(files_in(directory)) < BLOCKS:
                time.sleep(0.1)
    with mounted(scratch, tmp_path / "mnt") as mount:
        assert not list(directory.rglob("*.tmp"))
        with Vllm("vllm", model, tier_config(directory)) as vllm:
            warm = vllm.generate(prompt, out=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [BLOCKS * STORED_TOKENS]
        assert mount.statistics()["counters"]["mount_reads"] >= BLOCKS
        assert GPU_BLOCK_TOKENS < STORED_TOKENS
