"""SGLang's host pool without CUDA, for an engine on a CPU: importing this changes SGLang.

Its pool wants memory that CUDA has registered, and copies by kernels that have CUDA builds only.
Here nothing is registered, and the copies are PyTorch's; all else of HiCache is SGLang's own.
"""

from typing import Any

from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost


def backup(
    self: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
) -> None:
    """Copy rows of all layers from the device pool."""
    for layer in range(self.layer_num):
        for mine, theirs in sides(self, layer):
            mine[host_indices] = theirs[device_indices]


def load(
    self: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, *_: Any,
    **__: Any,
) -> None:  # fmt: skip
    """Copy rows of one layer to the device pool."""
    for mine, theirs in sides(self, layer_id):
        theirs[device_indices] = mine[host_indices]


def sides(pool: Any, layer: int) -> list[tuple[Any, Any]]:
    """K and V of a layer, row by row: in the host pool, and in the device pool."""
    assert pool.layout == "page_first"
    return [
        (pool.k_buffer[:, layer], pool.device_k_buffers[layer]),
        (pool.v_buffer[:, layer], pool.device_v_buffers[layer]),
    ]


common._cuda_host_register = lambda *_, **__: None
MHATokenToKVPoolHost.backup_from_device_all_layer = backup
MHATokenToKVPoolHost.load_to_device_per_layer = load
