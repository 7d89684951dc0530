"""The messages between client and daemon; limits and values in them are in wire.py.

Not a place for behaviour: frames, conversions and errors are in codec.py. All are immutable.
"""

from typing import Annotated

from msgspec import Meta, Struct

from twfs.core.operating import ARGUMENTS_BYTES_MAX
from twfs.metadata.meter import PREFILL_SECONDS_MAX, PREFILL_TOKENS_MAX
from twfs.protocol.wire import (
    LISTED_MAX,
    U16,
    U32,
    U64,
    WINDOW_BLOCKS_MAX,
    Hash,
    Key,
    LayoutJson,
    Listed,
    ModelName,
    ServedRow,
    SessionName,
    Token,
    WireArenaBlock,
    WireBlockInfo,
    WireDevice,
    WireHint,
    WireModel,
    WireModelInfo,
    WireNames,
)
from twfs.secret import SALT_BYTES
from twfs.store import (
    CheckReport,
    Explanation,
    ReaderName,
    ReadOutcome,
    Retention,
    SessionInfo,
    Space,
)
from twfs.tenants import EVERYBODY


class Request(Struct, frozen=True, tag_field="t", tag=str.lower):
    """What a client sends; the reply carries the same *id*. One-way requests have no reply."""

    id: U32


class Hello(Request, frozen=True):
    """The first frame of a connection; its shape is the same in every version."""

    version: int
    arena_bytes: U64 = 0
    hugetlb: bool = False


class OpenModel(Request, frozen=True):
    """Store.open_model."""

    name: ModelName
    layout: LayoutJson | None = None
    tenant: ModelName | None = None


class NewEpoch(Request, frozen=True):
    """Store.new_epoch."""

    model: WireModel


class MatchNames(Request, frozen=True):
    """Store.match; served in the loop."""

    model: U32
    names: WireNames
    start: U32 = 0
    tenant: U16 = EVERYBODY


class JoinLease(Request, frozen=True):
    """Store.join; served in the loop."""

    token: Token


class LookupNames(Request, frozen=True):
    """Store.lookup; served in the loop."""

    model: U32
    names: WireNames
    start: U32 = 0
    tenant: U16 = EVERYBODY


class TouchNames(Request, frozen=True):
    """Store.touch; one-way."""

    model: U32
    names: WireNames
    tenant: U16 = EVERYBODY
    hint: WireHint | None = None


class CountPrefill(Request, frozen=True):
    """Store.count_prefill; one-way."""

    model: U32
    tokens: Annotated[int, Meta(ge=1, le=PREFILL_TOKENS_MAX)]
    seconds: Annotated[float, Meta(gt=0, le=PREFILL_SECONDS_MAX)]


class RenewLease(Request, frozen=True):
    """LeaseHolder.renew; served in the loop."""

    token: Token


class ReleaseLease(Request, frozen=True):
    """LeaseHolder.release; one-way."""

    token: Token
    served: Annotated[tuple[ServedRow, ...], Meta(max_length=len(ReaderName))] = ()


class ReportBlock(Request, frozen=True):
    """LeaseHolder.report; one-way."""

    key: Key
    generation: U64
    outcome: ReadOutcome


class BeginPut(Request, frozen=True):
    """Open a put; the answer names what is lacking."""

    model: U32
    names: WireNames
    group: U16
    shard: U16
    retention: Retention
    tenant: U16 = EVERYBODY
    hint: WireHint | None = None


class ForgetSession(Request, frozen=True):
    """Store.forget."""

    model: U32
    session: SessionName
    tenant: U16 = EVERYBODY


class WriteBlocks(Request, frozen=True):
    """Hand over arena ranges of one window; answered when the arena may be reused."""

    put: U32
    blocks: Annotated[tuple[WireArenaBlock, ...], Meta(min_length=1, max_length=WINDOW_BLOCKS_MAX)]


class PublishPut(Request, frozen=True):
    """Publish what was written."""

    put: U32


class AbandonPut(Request, frozen=True):
    """Forfeit every reservation of a put."""

    put: U32


class ListModels(Request, frozen=True):
    """Namespace.models, behind the name *after*."""

    after: ModelName = ""
    limit: Listed = 128


class ListHeads(Request, frozen=True):
    """Namespace.heads."""

    model: U32
    after: Hash | None = None
    limit: Listed = 1000


class ListSessions(Request, frozen=True):
    """Namespace.sessions."""

    model: U32
    after: Hash | None = None
    limit: Listed = 1000


class ListDetached(Request, frozen=True):
    """Namespace.detached, in order of the packed keys, behind *after*."""

    model: U32
    after: Key | None = None
    limit: Listed = LISTED_MAX


class ListChain(Request, frozen=True):
    """Namespace.chain_of, from its row *first* on."""

    model: U32
    prefix_hash: Hash
    first: U32 = 0
    limit: Listed = LISTED_MAX


class InfoOfBlock(Request, frozen=True):
    """Namespace.block_info."""

    key: Key


class ReadPayload(Request, frozen=True):
    """Namespace.read_block; answered by several pieces."""

    info: WireBlockInfo


class RemoveSession(Request, frozen=True):
    """Namespace.remove."""

    model: U32
    head: Hash
    below: bool = False


class RetainSession(Request, frozen=True):
    """Namespace.set_retention."""

    model: U32
    head: Hash
    retention: Retention


class RetainNamed(Request, frozen=True):
    """Namespace.retain."""

    model: U32
    session: SessionName
    retention: Retention
    tenant: U16 = EVERYBODY


class EvictBytes(Request, frozen=True):
    """Namespace.evict."""

    wanted_bytes: U64


class ExplainNames(Request, frozen=True):
    """Namespace.explain."""

    model: U32
    names: WireNames
    tenant: U16 = EVERYBODY


class AskSpace(Request, frozen=True):
    """Namespace.space."""


class CheckAll(Request, frozen=True):
    """Namespace.check."""

    data: bool = False


class AskDevices(Request, frozen=True):
    """The table of devices as it is now, with descriptors."""


class AskStatus(Request, frozen=True):
    """Namespace.statistics, with the server's own under `server`."""


class AskChanges(Request, frozen=True):
    """Namespace.changes."""


class Operate(Request, frozen=True):
    """Namespace.operate; *arguments* are JSON."""

    verb: Annotated[str, Meta(max_length=64)]
    arguments: Annotated[bytes, Meta(max_length=ARGUMENTS_BYTES_MAX)]


class Reply(Struct, frozen=True, tag_field="t", tag=str.lower):
    """What the daemon sends; *id* is the request's, 0 where that could not be read."""

    id: U32


class Welcome(Reply, frozen=True):
    """The answer to a hello; the descriptors come with its first byte: devices, then the arena."""

    version: int
    warehouse: Hash
    devices: tuple[WireDevice, ...]
    arena_bytes: U64


class DeviceTable(Reply, frozen=True):
    """The devices; a descriptor of each that is passed comes with the first byte."""

    devices: tuple[WireDevice, ...]


class Failed(Reply, frozen=True):
    """The request failed; *kind* is a class of twfs.errors. The shape is the same in every version.

    With id 0 the connection is closed behind it.
    """

    kind: str
    text: str


class Done(Reply, frozen=True):
    """Nothing more to say."""


class Opened(Reply, frozen=True):
    """A model; *salt* is its tenant's secret, for a peer that may act for it.

    *public_salt* is that of the tenant's share group.
    """

    model: WireModel
    tenant: U16 = EVERYBODY
    salt: Annotated[bytes, Meta(max_length=SALT_BYTES)] = b""
    public_salt: Annotated[bytes, Meta(max_length=SALT_BYTES)] = b""

    def __repr__(self) -> str:
        return f"Opened(id={self.id}, model={self.model}, tenant={self.tenant})"


class Counted(Reply, frozen=True):
    """A number; None where a lease is over or nothing matched."""

    count: int | None


class LocatedBlocks(Reply, frozen=True):
    """A lease and where its blocks lie: LOCATED_DTYPE and EXTENT_DTYPE rows as bytes."""

    token: Token
    model: U32
    start: U32
    blocks: U32
    located: bytes
    extents: bytes
    term_ms: U64
    tenant: U16 = EVERYBODY


class PutBegun(Reply, frozen=True):
    """A put is open; *lacking* are packed u32 LE indices."""

    put: U32
    lacking: bytes


class PutDone(Reply, frozen=True):
    """Outcomes of a put: one byte per name, its place in PutOutcome."""

    outcomes: bytes
    written_bytes: U64


class ModelRows(Reply, frozen=True):
    """Models, by name."""

    models: tuple[WireModelInfo, ...]


class HashRows(Reply, frozen=True):
    """Packed 16-byte hashes."""

    hashes: bytes


class KeyRows(Reply, frozen=True):
    """Packed 23-byte block keys."""

    keys: bytes


class SessionRows(Reply, frozen=True):
    """Sessions, in order of their heads."""

    sessions: tuple[SessionInfo, ...]


class BlockRows(Reply, frozen=True):
    """Blocks of a chain, or the one asked for."""

    blocks: tuple[WireBlockInfo, ...]


class Piece(Reply, frozen=True):
    """The next bytes of a payload; *last* ends it."""

    data: bytes
    last: bool


class Explained(Reply, frozen=True):
    """An Explanation."""

    explanation: Explanation


class SpaceFigures(Reply, frozen=True):
    """A Space."""

    space: Space


class Checked(Reply, frozen=True):
    """A CheckReport."""

    report: CheckReport


class Status(Reply, frozen=True):
    """Statistics as JSON."""

    statistics: bytes


class Operated(Reply, frozen=True):
    """What the operation returned, as JSON."""

    result: bytes


AnyRequest = (
    Hello | OpenModel | NewEpoch | MatchNames | JoinLease | LookupNames | TouchNames | CountPrefill
    | RenewLease | ReleaseLease | ReportBlock | BeginPut | WriteBlocks | PublishPut | AbandonPut
    | ListModels | ListHeads | ListSessions | ListDetached | ListChain | InfoOfBlock | ReadPayload
    | RemoveSession | RetainSession | EvictBytes | ExplainNames | AskSpace | CheckAll | AskStatus
    | AskChanges | AskDevices | Operate | ForgetSession | RetainNamed
)  # fmt: skip
AnyReply = (
    Welcome | DeviceTable | Failed | Done | Opened | Counted | LocatedBlocks | PutBegun | PutDone
    | ModelRows | HashRows | KeyRows | SessionRows | BlockRows | Piece | Explained | SpaceFigures
    | Checked | Status | Operated
)  # fmt: skip
