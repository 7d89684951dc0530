"""vLLM's own `fs` tier, unmodified, with its directory under /files.

It hits after a restart, and computes what is lost: bytes that changed on the device, blocks that
cannot be read, a mount that has died. The tier calls a file that it cannot read a miss, and keeps
what it read before it in the same job (vllm/v1/kv_offload/tiering/fs/manager.py).
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from support.engines import until
from support.faultydisks import needs_faults
from support.filefaults import FaultyFiles, faulty_files
from support.mounting import mounted
from support.vllms import GPU_BLOCK_TOKENS, STORED_TOKENS, Vllm

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


@dataclass(frozen=True)
class Served:
    """One engine, whose tier is on a disk that a test commands."""

    files: FaultyFiles
    vllm: Vllm

    def cold(self, seed: int) -> tuple[list[int], list[Path]]:
        """The tokens that are computed for a prompt, and the files that it leaves."""
        before = set(files_in(self.files.directory))
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        assert answer["cached"] == [0]
        self.until_stored(len(before) + BLOCKS)
        tokens: list[int] = answer["tokens"][0]
        return tokens, sorted(set(files_in(self.files.directory)) - before)

    def until_stored(self, count: int) -> None:
        """Wait until there are so many files."""
        until(lambda: len(files_in(self.files.directory)) == count, "all is stored")

    def again(self, seed: int) -> tuple[list[int], int]:
        """Tokens, and how many were cached, when nothing but the files has its KV."""
        assert self.vllm.ask(do="reset", connector=True)
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        return answer["tokens"][0], answer["cached"][0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Served]:
    with (
        faulty_files(tmp_path_factory.mktemp("served")) as files,
        Vllm("vllm", model, tier_config(files.directory)) as vllm,
    ):
        yield Served(files, vllm)


@needs_faults
def test_a_file_whose_bytes_changed_on_the_device_is_computed_again(served: Served) -> None:
    tokens, files = served.cold(11)
    served.files.rot(files[0])
    again, cached = served.again(11)
    assert again == tokens
    assert cached < BLOCKS * STORED_TOKENS
    # It was gone for the tier, which has stored it anew.
    until(lambda: served.again(11) == (tokens, BLOCKS * STORED_TOKENS), "it is whole again")


@needs_faults
def test_a_file_that_cannot_be_read_is_computed_again(served: Served) -> None:
    tokens, files = served.cold(12)
    with served.files.unreadable(files[0]):
        again, cached = served.again(12)
    assert again == tokens
    assert cached < BLOCKS * STORED_TOKENS
    until(lambda: served.again(12) == (tokens, BLOCKS * STORED_TOKENS), "it is whole again")


@needs_faults
def test_a_mount_killed_during_a_load_costs_that_load(served: Served) -> None:
    tokens, _ = served.cold(13)
    served.files.hang()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(served.again, 13)
        served.files.kill_in_a_read()
        assert answer.result() == (tokens, 0)
    assert served.again(13) == (tokens, 0)  # nobody there at all: lookups are misses
    served.files.mount.start()
    assert served.again(13) == (tokens, BLOCKS * STORED_TOKENS)
