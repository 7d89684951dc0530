"""What vLLM makes of files that are lost, whoever keeps its KV in them: tests for whom to import.

A module that imports them has a fixture `served`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.engines import until
from support.faultydisks import needs_faults
from support.filefaults import FaultyFiles
from support.vllms import STORED_TOKENS, Vllm

TOKENS: Final = 2000  # of a prompt
BLOCKS: Final = TOKENS // STORED_TOKENS  # of vLLM's tier as it is told, of LMCache by itself
HELD: Final = BLOCKS * STORED_TOKENS  # tokens that its files hold
LOSSES: Final = ((11, FaultyFiles.rotten), (12, FaultyFiles.unreadable))  # each of its own seed


@dataclass(frozen=True)
class Served:
    """An engine whose files are on a disk that a test commands."""

    files: FaultyFiles
    vllm: Vllm
    suffix: str  # of its blocks' files
    forget: Callable[[], None]  # empties all that holds KV above the files

    def cold(self, seed: int) -> tuple[list[int], list[Path]]:
        """The tokens that are computed for a prompt, and the files that it leaves."""
        before = blocks_in(self.files.directory, self.suffix)
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        assert answer["cached"] == [0]
        until_blocks(self.files.directory, self.suffix, len(before) + BLOCKS)
        tokens: list[int] = answer["tokens"][0]
        return tokens, sorted(blocks_in(self.files.directory, self.suffix) - before)

    def again(self, seed: int) -> tuple[list[int], int]:
        """Tokens, and how many were cached, when nothing but the files has its KV."""
        self.forget()
        answer = self.vllm.generate({"seed": seed, "tokens": TOKENS}, out=8)
        return answer["tokens"][0], answer["cached"][0]


def blocks_in(directory: Path, suffix: str) -> set[Path]:
    """The files of all blocks."""
    return set(directory.rglob(f"*{suffix}"))


def until_blocks(directory: Path, suffix: str, count: int) -> None:
    """Wait until so many blocks have their files."""
    until(lambda: len(blocks_in(directory, suffix)) == count, f"{count} blocks are stored")


@needs_faults
@pytest.mark.parametrize(("seed", "losing"), LOSSES)
def test_a_file_that_is_lost_is_computed_again(
    served: Served, seed: int, losing: Callable[[FaultyFiles, Path], AbstractContextManager[None]]
) -> None:
    tokens, files = served.cold(seed)
    with losing(served.files, files[0]):
        again, cached = served.again(seed)
    assert again == tokens
    assert cached < HELD
    # It was gone for whoever keeps the files, who has stored it anew.
    until(lambda: served.again(seed) == (tokens, HELD), "it is whole again")


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
    assert served.again(13) == (tokens, HELD)
