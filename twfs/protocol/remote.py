"""The Namespace half of a client: what tools and the mount ask, each a request and its answer.

Not for engines, and not for leases or puts. Unlike matches these calls raise: NoDaemon when nobody
answers. Thread-safe.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from twfs.errors import NoDaemon, ProtocolError
from twfs.hints import check_session
from twfs.prefix import Names
from twfs.protocol.codec import (
    block_info_of,
    block_info_to_wire,
    error_of,
    key_of,
    model_info_of,
    names_to_wire,
)
from twfs.protocol.messages import (
    AnyReply,
    AskChanges,
    AskSpace,
    AskStatus,
    BlockRows,
    CheckAll,
    Checked,
    Counted,
    Done,
    EvictBytes,
    Explained,
    ExplainNames,
    Failed,
    HashRows,
    InfoOfBlock,
    KeyRows,
    ListChain,
    ListDetached,
    ListHeads,
    ListModels,
    ListSessions,
    ModelRows,
    Operate,
    Operated,
    Piece,
    ReadPayload,
    RemoveSession,
    Request,
    RetainNamed,
    RetainSession,
    SessionRows,
    SpaceFigures,
    Status,
)
from twfs.protocol.wire import LISTED_MAX
from twfs.records import BLOCK_KEY, BlockKey
from twfs.store import (
    BlockInfo,
    CheckReport,
    Explanation,
    ModelInfo,
    Retention,
    SessionInfo,
    Space,
)
from twfs.tenants import EVERYBODY, Tenant, Tenants
from twfs.units import HASH_BYTES, ByteCount, DeviceIndex, ModelId, PrefixHash

ASK_SECONDS_MAX: Final = 30.0  # for an answer from memory and metadata, behind a busy daemon's work

_R = TypeVar("_R", bound=AnyReply)


class RemoteNamespace:
    """A Namespace over a connection that the subclass keeps."""

    def _request(self, request: Request, timeout_s: float | None) -> AnyReply | None:
        """Send *request* and return its reply, None when it takes too long; NoDaemon."""
        raise NotImplementedError

    def _request_pieces(
        self, request: Request, timeout_s: float | None
    ) -> Iterator[AnyReply | None]:
        """As _request, for a request with several replies."""
        raise NotImplementedError

    def _ask(
        self, request: Request, kind: type[_R], timeout_s: float | None = ASK_SECONDS_MAX
    ) -> _R:
        """Return the reply to *request*, of *kind*; raises what the daemon raised, or NoDaemon."""
        return _checked(self._request(request, timeout_s), kind)

    def models(self) -> list[ModelInfo]:
        """See Namespace.models."""
        infos: list[ModelInfo] = []
        while rows := self._ask(ListModels(0, infos[-1].name if infos else ""), ModelRows).models:
            infos += map(model_info_of, rows)
        return infos

    def heads(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[PrefixHash]:
        """See Namespace.heads; at most 4096 at once."""
        request = ListHeads(0, model, after, _bounded(limit))
        return [PrefixHash(row) for row in _cut(self._ask(request, HashRows).hashes, HASH_BYTES)]

    def sessions(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[SessionInfo]:
        """See Namespace.sessions; at most 4096 at once."""
        request = ListSessions(0, model, after, _bounded(limit))
        return list(self._ask(request, SessionRows).sessions)

    def detached(self, model: ModelId) -> list[BlockKey]:
        """See Namespace.detached."""
        keys: list[bytes] = []
        while rows := self._ask(ListDetached(0, model, keys[-1] if keys else None), KeyRows).keys:
            keys += _cut(rows, BLOCK_KEY.size)
        return [key_of(key) for key in keys]

    def chain_of(self, model: ModelId, prefix_hash: PrefixHash) -> list[BlockInfo]:
        """See Namespace.chain_of."""
        infos: list[BlockInfo] = []
        while True:
            rows = self._ask(ListChain(0, model, prefix_hash, len(infos)), BlockRows).blocks
            infos += map(block_info_of, rows)
            if len(rows) < LISTED_MAX:
                return infos

    def block_info(self, key: BlockKey) -> BlockInfo:
        """See Namespace.block_info."""
        rows = self._ask(InfoOfBlock(0, key.pack()), BlockRows).blocks
        if len(rows) != 1:
            raise ProtocolError(f"{len(rows)} rows about one block")
        return block_info_of(rows[0])

    def read_block(self, info: BlockInfo) -> memoryview:
        """See Namespace.read_block; the bytes come over the socket."""
        payload = bytearray()
        request = ReadPayload(0, block_info_to_wire(info))
        for reply in self._request_pieces(request, ASK_SECONDS_MAX):
            payload += _checked(reply, Piece).data
            if len(payload) > info.block.payload_bytes:
                break
        if len(payload) != info.block.payload_bytes:
            raise ProtocolError(
                f"a payload of {len(payload)} bytes came instead of {info.block.payload_bytes}"
            )
        return memoryview(payload).toreadonly()

    def remove(self, model: ModelId, head: PrefixHash, *, below: bool = False) -> ByteCount:
        """See Namespace.remove."""
        return ByteCount(self._count(RemoveSession(0, model, head, below), None))

    def set_retention(self, model: ModelId, head: PrefixHash, retention: Retention) -> None:
        """See Namespace.set_retention."""
        self._ask(RetainSession(0, model, head, retention), Done, None)

    def retain(
        self, model: ModelId, session: str, retention: Retention, *, tenant: int = EVERYBODY
    ) -> None:
        """See Namespace.retain."""
        check_session(session)
        self._ask(RetainNamed(0, model, session, retention, tenant), Done, None)

    def evict(self, wanted_bytes: ByteCount) -> ByteCount:
        """See Namespace.evict."""
        return ByteCount(self._count(EvictBytes(0, wanted_bytes), None))

    def explain(self, model: ModelId, names: Names, *, tenant: int = EVERYBODY) -> Explanation:
        """See Namespace.explain."""
        request = ExplainNames(0, model, names_to_wire(names), tenant)
        return self._ask(request, Explained).explanation

    def tenants(self) -> Tenants:
        """See Namespace.tenants."""
        return Tenants(msgspec.convert(self.operate("tenant-list"), tuple[Tenant, ...]))

    def space(self) -> Space:
        """See Namespace.space."""
        return self._ask(AskSpace(0), SpaceFigures).space

    def device_paths(self) -> Mapping[DeviceIndex, Path]:
        """See Namespace.device_paths."""
        raise NotImplementedError

    def check(self, *, data: bool = False) -> CheckReport:
        """See Namespace.check; waits as long as it takes."""
        return self._ask(CheckAll(0, data), Checked, None).report

    def changes(self) -> int:
        """See Namespace.changes."""
        return self._count(AskChanges(0), ASK_SECONDS_MAX)

    def operate(self, verb: str, **arguments: Any) -> Any:
        """See Namespace.operate; waits as long as it takes."""
        request = Operate(0, verb, msgspec.json.encode(arguments))
        return msgspec.json.decode(self._ask(request, Operated, None).result)

    def _daemon_statistics(self) -> dict[str, Any]:
        """The warehouse's and the server's statistics; NoDaemon."""
        data = self._ask(AskStatus(0), Status).statistics
        try:
            statistics = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"statistics of {len(data)} bytes are no JSON: {error}") from error
        if not isinstance(statistics, dict):
            raise ProtocolError("statistics that are no mapping")
        return statistics

    def _count(self, request: Request, timeout_s: float | None) -> int:
        """Return the number that answers *request*."""
        count = self._ask(request, Counted, timeout_s).count
        if count is None:
            raise ProtocolError("an answer without its number")
        return count


def _checked(reply: AnyReply | None, kind: type[_R]) -> _R:
    """Return *reply* if it is of *kind*; raise what else it says."""
    if reply is None:
        raise NoDaemon("the daemon did not answer in time: it is overloaded or stopped")
    if isinstance(reply, Failed):
        raise error_of(reply)
    if not isinstance(reply, kind):
        raise ProtocolError(f"the daemon answered with a {type(reply).__name__}")
    return reply


def _bounded(limit: int) -> int:
    """*limit* as a listing may ask for it."""
    return max(1, min(limit, LISTED_MAX))


def _cut(data: bytes, step: int) -> list[bytes]:
    """Cut packed rows of *step* bytes; ProtocolError if they do not come out even."""
    if len(data) % step:
        raise ProtocolError(f"{len(data)} bytes are no rows of {step}")
    return [data[at : at + step] for at in range(0, len(data), step)]
