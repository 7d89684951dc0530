"""LMCache's own `fs` and `fs_native` L2, unmodified, with O_DIRECT below /files.

They hit after a restart, and what is lost is computed: bytes that changed on the device, blocks
that cannot be read, a mount that has died.
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
from support.lmcaches import LMCacheServer
from support.mounting import mounted
from support.vllms import Vllm

ENGINE: Final = "lmcache"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(900)]  # fmt: skip

TOKENS: Final = 2000
UNIT: Final = 256  # tokens of one of LMCache's own blocks
BLOCKS: Final = TOKENS // UNIT
KINDS: Final = ("fs", "fs_native")


def adapter_of(kind: str, directory: Path) -> dict[str, Any]:
    """What `--l2-adapter` is given, as docs/files.md says."""
    return {"type": kind, "base_path": str(directory), "use_odirect": True}


def files_in(directory: Path) -> list[Path]:
    """The adapter's blocks."""
    return sorted(directory.rglob("*.data"))


@pytest.mark.parametrize("kind", KINDS)
def test_lmcache_finds_its_files_after_a_restart(
    kind: str, model: Path, scratch: Path, tmp_path: Path
) -> None:
    prompt = {"seed": 1, "tokens": TOKENS}
    directory = tmp_path / "mnt/files/kv"
    adapter = adapter_of(kind, directory)
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        with (
            LMCacheServer(scratch, adapter) as server,
            Vllm("lmcache", model, server.transfer) as vllm,
        ):
            cold = vllm.generate(prompt, out=8)
            assert cold["cached"] == [0]
            while len(files_in(directory)) < BLOCKS:
                time.sleep(0.1)
    with mounted(scratch, tmp_path / "mnt") as mount:
        with (
            LMCacheServer(scratch, adapter) as server,
            Vllm("lmcache", model, server.transfer) as vllm,
        ):
            warm = vllm.generate(prompt, out=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [BLOCKS * UNIT]
        assert mount.statistics()["counters"]["mount_reads"] >= BLOCKS


@dataclass(frozen=True)
class Served:
    """One server and an engine that caches nothing itself, on a disk that a test commands."""

    files: FaultyFiles
    server: LMCacheServer
    vllm: Vllm

    def cold(self, seed: int) -> tuple[list[int], list[Path]]:
        """The tokens that are computed for a prompt, and the files that it leaves."""
        before = files_in(self.files.directory)
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        assert answer["cached"] == [0]
        until(lambda: len(files_in(self.files.directory)) == len(before) + BLOCKS, "all is stored")
        tokens: list[int] = answer["tokens"][0]
        return tokens, sorted(set(files_in(self.files.directory)) - set(before))

    def again(self, seed: int) -> tuple[list[int], int]:
        """Tokens, and how many were cached, when nothing but the files has its KV."""
        self.server.clear()
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        return answer["tokens"][0], answer["cached"][0]


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[Served]:
    with (
        faulty_files(tmp_path_factory.mktemp("served")) as files,
        LMCacheServer(files.directory, adapter_of(request.param, files.directory)) as server,
        Vllm("lmcache", model, server.transfer, enable_prefix_caching=False) as vllm,
    ):
        yield Served(files, server, vllm)


@needs_faults
def test_a_file_whose_bytes_changed_on_the_device_is_computed_again(served: Served) -> None:
    tokens, files = served.cold(11)
    served.files.rot(files[0])
    again, cached = served.again(11)
    assert again == tokens
    assert cached < BLOCKS * UNIT
    # It was gone for the adapter, which has stored it anew.
    until(lambda: served.again(11) == (tokens, BLOCKS * UNIT), "it is whole again")


@needs_faults
def test_a_file_that_cannot_be_read_is_computed_again(served: Served) -> None:
    tokens, files = served.cold(12)
    with served.files.unreadable(files[0]):
        again, cached = served.again(12)
    assert again == tokens
    assert cached < BLOCKS * UNIT
    until(lambda: served.again(12) == (tokens, BLOCKS * UNIT), "it is whole again")


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
    assert served.again(13) == (tokens, BLOCKS * UNIT)
