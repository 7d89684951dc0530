"""Guaranteed: an engine's KV goes from a GPU's memory to the store and back, in the GPU's order.

The same on the CPU, where there is no order to keep, so that these tests themselves are run.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from support.coreengine import BLOCK_BYTES, Engine, keys_of, layout_of
from support.daemon import running_daemon
from twfs.engines.vllm_prefill import GpuMark

COUNT = 12
CUTS = (0, 4096, 30_001, BLOCK_BYTES)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running_daemon(tmp_path / "w") as daemon:
        made = Engine(daemon, layout_of())
        yield made
        made.close()


def blocks_on(device: str) -> list[list[Any]]:
    """Blocks of three pieces each, of zeros."""
    return [
        [
            torch.zeros(stop - start, dtype=torch.uint8, device=device)
            for start, stop in pairwise(CUTS)
        ]
        for _ in range(COUNT)
    ]


def fill(blocks: list[list[Any]], seed: int) -> None:
    """Have the device write them; on a GPU behind work that takes a while."""
    on = blocks[0][0].device
    busy = torch.ones(2048, 2048, device=on)
    for _ in range(50 if on.type == "cuda" else 1):
        busy = busy @ busy / 2048
    for number, pieces in enumerate(blocks):
        for piece in pieces:
            piece.fill_((7 * number + seed) % 251)  # on the same stream, so behind it


def values_of(blocks: list[list[Any]]) -> list[set[int]]:
    return [{int(value) for piece in pieces for value in piece.unique()} for pieces in blocks]


def test_what_a_device_computes_is_stored_and_comes_back(device: str, engine: Engine) -> None:
    keys, blocks = keys_of("a", COUNT), blocks_on(device)
    expected = [{(7 * number + 1) % 251} for number in range(COUNT)]
    fill(blocks, 1)
    engine.store(keys, blocks)  # in the order of the stream: what is still being computed
    into = blocks_on(device)
    assert engine.ask("r", keys) == COUNT
    fill(into, 100)  # whose writes come before what is loaded
    assert engine.load("r", 0, into).blocks == COUNT
    assert values_of(into) == expected


def test_memory_that_was_given_back_may_be_written(device: str, engine: Engine) -> None:
    keys, blocks = keys_of("a", COUNT), blocks_on(device)
    fill(blocks, 1)
    (worker,) = engine.workers
    worker.store(1, engine.offer(keys), blocks)
    engine.end(0, 1)
    fill(blocks, 2)  # what is stored was read before
    worker.drain()
    while engine.ask("r", keys) < COUNT:
        engine.finder.loaded("r")  # not yet published
    into = blocks_on(device)
    assert engine.load("r", 0, into).blocks == COUNT
    assert values_of(into) == [{(7 * number + 1) % 251} for number in range(COUNT)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_marks_on_a_stream_tell_how_long_the_gpu_computes() -> None:
    busy = torch.ones(4096, 4096, device="cuda")
    begun = GpuMark()
    for _ in range(100):
        busy = busy @ busy / 4096
    ended = GpuMark()
    torch.cuda.synchronize()
    assert ended.reached()
    assert ended.seconds_since(begun) > 0
