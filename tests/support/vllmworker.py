"""One rank of vLLM's connector without an engine around it, driven by a test (support.asking).

`python -m support.vllmworker SOCKET PACKED BLOCK_BYTES REVISION` runs in the engine's environment,
against a real daemon. The memory is as vLLM lays it out on a GPU, and vLLM's own code hands it to
the connector: each layer for itself, or, PACKED, all layers of a block side by side, which
attention on a CPU does not take. Both sides believe that a block of the engine has BLOCK_BYTES, and
the scheduler's that the weights are of REVISION.
"""

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from support.answering import Answers
from support.vllmmanager import TOKENS, request_of, spec_of, until_ready
from twfs.engines.vllm import TwfsConnector, TwfsManager, TwfsWorker
from twfs.engines.vllm_layout import IDENTITY

LAYERS: Final = 4
LAYER_BYTES: Final = 4096  # of one of the engine's blocks
BLOCKS: Final = 64  # of the engine
PER_CHUNK: Final = 4  # of these in a stored block
ARENA_BYTES: Final = 2 * PER_CHUNK * LAYERS * LAYER_BYTES  # so few that stores wait for room


class Rank:
    """The scheduler's side, and one worker."""

    def __init__(self, socket: Path, *, packed: bool, block_bytes: int, revision: str) -> None:
        sizes: dict[str, Any] = {"block_bytes": block_bytes, "blocks_per_chunk": PER_CHUNK}
        more: dict[str, Any] = {
            "min_load_tokens": 0,
            "arena_bytes": 1 << 20,
            IDENTITY: {"revision": revision},
        }
        self.manager = TwfsManager(spec_of(socket, **sizes, **more))
        self.memory = torch.zeros(BLOCKS, LAYERS, LAYER_BYTES, dtype=torch.int8)
        if not packed:  # layer by layer
            self.memory = self.memory.view(LAYERS, BLOCKS, LAYER_BYTES).transpose(0, 1)
        layers = {f"layer {i}": self.memory[:, i] for i in range(LAYERS)}
        kind: Any = FullAttentionSpec(
            block_size=TOKENS, num_kv_heads=1, head_size=16, dtype=torch.bfloat16
        )
        assert kind.page_size_bytes == LAYER_BYTES
        grid: Any = SimpleNamespace(  # of which vLLM derives no canonical pages
            tensor_parallel_size=1, prefill_context_parallel_size=1, world_size=2
        )
        self.connector = TwfsConnector.__new__(TwfsConnector)
        self.connector.connector_worker = OffloadingConnectorWorker(
            spec_of(socket, arena_bytes=ARENA_BYTES, **sizes),
            SimpleNamespace(parallel_config=grid),
            KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec([*layers], kind)]),
        )
        self.connector.register_kv_caches(layers)
        self.job = 0
        self.told: list[int] = []  # of each store that has ended, how many blocks are held
        self.returned = threading.Event()

    @property
    def worker(self) -> TwfsWorker:
        """The adapter."""
        worker = self.connector._worker
        assert worker is not None
        return worker

    def fill(self, seed: int) -> None:
        """Have other bytes in all of the engine's memory."""
        made = np.random.default_rng(seed).integers(-128, 128, self.memory.shape, dtype=np.int8)
        self.memory.copy_(torch.from_numpy(made))

    def content(self, blocks: Sequence[int]) -> str:
        """What is in these blocks of the engine."""
        return hashlib.sha256(self.memory[list(blocks)].numpy().tobytes()).hexdigest()

    def pieces(self, blocks: Sequence[int]) -> list[int]:
        """Bytes of each piece of memory of which a stored block is made."""
        return [piece.nbytes for piece in self.worker._pieces(blocks)]

    def store(self, blocks: Sequence[int]) -> int:
        """Begin to store the engine's *blocks* as the chain's first; returns how many are."""
        request, context, keys = request_of(self.manager, "store", len(blocks) // PER_CHUNK)
        until_ready(self.manager, request)
        output = self.manager.prepare_store(keys, context)
        held = len(keys) - len(output.keys_to_store)
        taken = blocks[held * PER_CHUNK :]
        self.job += 1
        gpu = GPULoadStoreSpec(list(taken), [len(taken)], [held * PER_CHUNK])
        assert self.worker.submit_store(self.job, gpu, output.store_spec)
        self.manager.on_request_finished(context)
        return len(output.keys_to_store)

    def load(self, blocks: Sequence[int], seconds: float) -> int:
        """Begin to load what is held of the chain into the engine's *blocks*; how many stored."""
        request, context, keys = request_of(self.manager, "load", len(blocks) // PER_CHUNK)
        until_ready(self.manager, request)
        found = self.manager.requests["load"].blocks
        if not found:
            return 0
        self.manager.breakeven.given_s = seconds
        spec = self.manager.prepare_load(keys[:found], context)
        taken = list(blocks[: found * PER_CHUNK])
        self.job += 1
        assert self.worker.submit_load(self.job, spec, GPULoadStoreSpec(taken, [len(taken)], [0]))
        return found

    def finished(self) -> dict[str, Any]:
        """Which jobs have; which blocks no load has filled; what is held of each store, so far."""
        jobs = [result.job_id for result in self.worker.get_finished()]
        report = self.worker.report(None)
        if report is not None:
            self.told += [held for each in report.stored.values() for held in each]
        return {
            "jobs": jobs, "failed": sorted(self.connector.get_block_ids_with_load_errors()),
            "held": self.told,
        }  # fmt: skip

    def unregister(self) -> None:
        """Begin to give the memory back; `returned` tells whether that has ended."""

        def work() -> None:
            self.connector.unregister_kv_caches()
            self.returned.set()

        self.returned.clear()
        threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """End both sides."""
        self.worker.shutdown()
        self.manager.shutdown()


def wanted_layout() -> str | None:
    """The layout that vLLM tries to give an engine with this connector."""
    config: Any = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(
            kv_connector="TwfsConnector", kv_connector_module_path="twfs.engines.vllm",
            kv_role="kv_both",
        )
    )  # fmt: skip
    layout: str | None = get_kv_connector_cache_layout(config)
    return layout


REQUESTS: Final[dict[str, Callable[[Rank, dict[str, Any]], Any]]] = {
    "fill": lambda rank, more: rank.fill(more["seed"]),
    "content": lambda rank, more: rank.content(more["blocks"]),
    "pieces": lambda rank, more: rank.pieces(more["blocks"]),
    "store": lambda rank, more: rank.store(more["blocks"]),
    "load": lambda rank, more: rank.load(more["blocks"], more["seconds"]),
    "finished": lambda rank, _: rank.finished(),
    "unregister": lambda rank, _: rank.unregister(),
    "returned": lambda rank, _: rank.returned.is_set(),
    "counts": lambda rank, _: rank.worker.attachment.statistics(),
    "layout": lambda _, __: wanted_layout(),
}


def main() -> None:
    """Serve until stdin ends."""
    answers = Answers()
    socket, packed, block_bytes, revision = sys.argv[1:]
    rank = Rank(
        Path(socket), packed=packed == "1", block_bytes=int(block_bytes), revision=revision
    )  # fmt: skip
    for request in answers.requests():
        answers.say(REQUESTS[request["do"]](rank, request))
    rank.close()


if __name__ == "__main__":
    main()
