"""A put of this process, as `upload` drives it: the counterpart of the client's RemotePut."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from twfs.datapath.putting import Put
from twfs.devices.arena import Arena
from twfs.store import ArenaBlock, PutResult


class LocalPort:
    """A PutPort over a put of this process."""

    def __init__(self, put: Put, arena: Arena, executor: ThreadPoolExecutor) -> None:
        self._put = put
        self._arena = arena
        self._executor = executor
        self._writing: list[Future[None]] = []

    @property
    def lacking(self) -> Sequence[int]:
        """See PutPort.lacking."""
        return self._put.lacking

    def write(self, blocks: Sequence[ArenaBlock]) -> "Future[None]":
        """See PutPort.write."""
        future = self._executor.submit(self._put.write_blocks, self._arena.view, blocks)
        self._writing.append(future)
        return future

    def publish(self) -> PutResult:
        """See PutPort.publish."""
        return self._put.publish()

    def abandon(self) -> None:
        """See PutPort.abandon."""
        for future in self._writing:
            future.cancel()
        for future in self._writing:
            if not future.cancelled():
                future.exception()  # wait: its writes go to extents that are to be forfeited
        self._put.abandon()
