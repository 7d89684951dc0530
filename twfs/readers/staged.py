"""The staged reader: host reads into pinned huge pages, verified there, then copied to the GPU.

The dependable way to a GPU wherever GPUDirect is not. Serves host memory too, when asked for by
name. Thread-safe.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any

from twfs.checksums import Bytes, loaded_torch
from twfs.devices.arena import Arena
from twfs.readers.base import BlockRead, scatter
from twfs.readers.host import HostReader
from twfs.units import IO_BYTES_MAX


class StagedReader(HostReader):
    """See the module's docstring; copies run on streams of their own, beside further reads."""

    name = "staged"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams: dict[Any, Any] = {}  # one per GPU written to
        self._streams_lock = Lock()

    def _make_arena(self, byte_count: int) -> Arena:
        """Make pinned memory: copies from any other are synchronous, and half as fast."""
        arena = Arena.private(byte_count)
        arena.pin()
        return arena

    def _places_directly(self, block: BlockRead) -> bool:  # noqa: ARG002
        """Never: what reaches a destination has been verified."""
        return False

    def _stream(self, device: Any) -> Any:
        """Return the stream for copies to *device*."""
        with self._streams_lock:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = loaded_torch().cuda.Stream(device)
            return stream

    def _wait_for(self, after: Sequence[Any]) -> None:
        """Order the copies behind earlier work on the destinations; the reads need not wait."""
        for event in after:
            self._stream(event.device).wait_event(event)

    def _deliver(self, block: BlockRead, source: Bytes) -> None:
        """Begin the copy of verified bytes; several pieces cross the bus as one."""
        tensor = block.targets[0].tensor
        if tensor is None:
            super()._deliver(block, source)
            return
        torch = loaded_torch()
        host = torch.from_numpy(source)
        with torch.cuda.stream(self._stream(tensor.device)):
            if len(block.targets) == 1:
                for to, of in zip(
                    tensor.split(IO_BYTES_MAX), host.split(IO_BYTES_MAX), strict=True
                ):
                    to.copy_(of, non_blocking=True)
            else:
                # Freed at the end of this call and reused on this stream only, in its order.
                scatter([(block.targets, host.to(tensor.device, non_blocking=True))])

    def _settle(self) -> None:
        """Wait for all copies, since the arena is reused and the caller's memory may be freed."""
        with self._streams_lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.synchronize()
