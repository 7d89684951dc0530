"""LMCache's own `fs` and `fs_native` L2, unmodified, with O_DIRECT below /files.

They hit after a restart, and what is lost is computed: bytes that changed on the device, blocks
that cannot be read, a mount that has died.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.filefaults import faulty_files
from support.lmcaches import LMCacheServer
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
from support.vllms import Vllm

ENGINE: Final = "lmcache"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(900)]  # fmt: skip

SUFFIX: Final = ".data"
KINDS: Final = ("fs", "fs_native")


def adapter_of(kind: str, directory: Path) -> dict[str, Any]:
    """What `--l2-adapter` is given, as docs/files.md says."""
    option, other = settings_of("files.md", "LMCache")
    word, text = shlex.split(option)
    assert word == "--l2-adapter"
    found: dict[str, Any] = json.loads(text.replace("/tw/files/cache", str(directory)))
    instead = json.loads(f"{{{other}}}")
    assert {found["type"], instead["type"]} == set(KINDS)
    return found if kind == found["type"] else found | instead


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
            until_blocks(directory, SUFFIX, BLOCKS)
    with mounted(scratch, tmp_path / "mnt") as mount:
        with (
            LMCacheServer(scratch, adapter) as server,
            Vllm("lmcache", model, server.transfer) as vllm,
        ):
            warm = vllm.generate(prompt, out=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [HELD]
        assert mount.statistics()["counters"]["mount_reads"] >= BLOCKS


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[Served]:
    with (
        faulty_files(tmp_path_factory.mktemp("served")) as files,
        LMCacheServer(files.directory, adapter_of(request.param, files.directory)) as server,
        Vllm("lmcache", model, server.transfer, enable_prefix_caching=False) as vllm,
    ):
        yield Served(files, vllm, SUFFIX, server.clear)
