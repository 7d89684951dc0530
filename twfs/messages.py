"""The messages between client and daemon: what each carries, and the limits that decoding checks.

Not a place for behaviour: frames, conversions and errors are in protocol.py. All are immutable.
"""

from typing import Annotated, Final

from msgspec import Meta, Struct

from twfs.operating import ARGUMENTS_BYTES_MAX
from twfs.records import BLOCK_KEY
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
from twfs.units import BLOCK_BYTES_MAX, DIGEST_BYTES, HASH_BYTES, KEY_BYTES_MAX, NAME_BYTES_MAX

PROTOCOL_VERSION: Final = 2
LENGTH_BYTES: Final = 4
HELLO_BYTES_MAX: Final = 64 << 10  # of a frame before the hello: a stranger gets little memory
REQUEST_BYTES_MAX: Final = 4 << 20  # names of BLOCKS_MAX blocks with keys take 2.4 MiB
FRAME_BYTES_MAX: Final = 16 << 20  # a reply on 7,680 blocks x 8 shards takes 6 MiB
BLOCKS_MAX: Final = 16_384  # of one request: a million tokens in blocks of 64
WINDOW_BLOCKS_MAX: Final = 256  # of one write: enough to keep a drive busy
TOKEN_BYTES_MAX: Final = 64  # a lease's token
LAYOUT_BYTES_MAX: Final = 64 << 10  # 64 groups of 256 bytes, and their overrides
PIECE_BYTES: Final = 1 << 20  # payload of one piece of a block that is read over the socket
LISTED_MAX: Final = 4096  # rows of one answer to a listing; the client asks again behind the last

_U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
_U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
_U64 = Annotated[int, Meta(ge=0)]  # msgpack has no larger integer
_Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
_Key = Annotated[bytes, Meta(min_length=BLOCK_KEY.size, max_length=BLOCK_KEY.size)]
_Token = Annotated[bytes, Meta(min_length=1, max_length=TOKEN_BYTES_MAX)]
_Name = Annotated[str, Meta(max_length=NAME_BYTES_MAX)]
_Served = tuple[ReaderName, _U32, _U64]  # blocks, payload bytes
_LayoutJson = Annotated[bytes, Meta(max_length=LAYOUT_BYTES_MAX)]
_Listed = Annotated[int, Meta(ge=1, le=LISTED_MAX)]


class WireNames(Struct, array_like=True, frozen=True):
    """Names as they travel; *positions* are packed u32 LE."""

    hashes: bytes
    digests: bytes
    parents: bytes
    positions: bytes
    keys: tuple[Annotated[bytes, Meta(max_length=KEY_BYTES_MAX)], ...] = ()

    def __post_init__(self) -> None:
        count = len(self.positions) // 4
        lengths = (len(self.hashes), len(self.digests), len(self.parents), len(self.positions))
        if lengths != (HASH_BYTES * count, DIGEST_BYTES * count, HASH_BYTES * count, 4 * count):
            raise ValueError(f"names have hashes, digests, parents, positions of {lengths} bytes")
        if count > BLOCKS_MAX or len(self.keys) not in {0, count}:
            raise ValueError(f"{count} names with {len(self.keys)} keys; at most {BLOCKS_MAX}")


class WireArenaBlock(Struct, array_like=True, frozen=True):
    """An ArenaBlock as it travels."""

    index: _U32
    arena_offset: _U64
    payload_bytes: Annotated[int, Meta(ge=1, le=BLOCK_BYTES_MAX)]
    xxh3: _Hash
    lane_plain: _U64
    lane_weighted: _U64


class WireBlockInfo(Struct, array_like=True, frozen=True):
    """A BlockInfo as it travels: packed key and record, and what is not in them."""

    key: _Key
    record: Annotated[bytes, Meta(max_length=1024)]
    index: _U32
    last_use_ms: _U64
    links: _U32


class WireModel(Struct, array_like=True, frozen=True):
    """A Model as it travels; the layout is its to_dict as JSON."""

    id: _U32
    name: _Name
    epoch: _U64
    layout: _LayoutJson


class WireModelInfo(Struct, array_like=True, frozen=True):
    """A ModelInfo as it travels."""

    model: WireModel
    created_ms: _U64
    blocks: _U64
    heads: _U64
    device_bytes: _U64


class WireDevice(Struct, array_like=True, frozen=True):
    """One row of the device table; *passed* tells whether a descriptor of it came along."""

    index: _U16
    uuid: _Hash
    path: str
    size_bytes: _U64
    passed: bool


class Request(Struct, frozen=True, tag_field="t", tag=str.lower):
    """What a client sends; the reply carries the same *id*. One-way requests have no reply."""

    id: _U32


class Hello(Request, frozen=True):
    """The first frame of a connection; its shape is the same in every version."""

    version: int
    arena_bytes: _U64 = 0
    hugetlb: bool = False


class OpenModel(Request, frozen=True):
    """Store.open_model."""

    name: _Name
    layout: _LayoutJson | None = None
    tenant: _Name | None = None


class NewEpoch(Request, frozen=True):
    """Store.new_epoch."""

    model: WireModel


class MatchNames(Request, frozen=True):
    """Store.match; served in the loop."""

    model: _U32
    names: WireNames
    start: _U32 = 0
    tenant: _U16 = EVERYBODY


class JoinLease(Request, frozen=True):
    """Store.join; served in the loop."""

    token: _Token


class LookupNames(Request, frozen=True):
    """Store.lookup; served in the loop."""

    model: _U32
    names: WireNames
    start: _U32 = 0
    tenant: _U16 = EVERYBODY


class TouchNames(Request, frozen=True):
    """Store.touch; one-way."""

    model: _U32
    names: WireNames
    tenant: _U16 = EVERYBODY


class RenewLease(Request, frozen=True):
    """LeaseHolder.renew; served in the loop."""

    token: _Token


class ReleaseLease(Request, frozen=True):
    """LeaseHolder.release; one-way."""

    token: _Token
    served: Annotated[tuple[_Served, ...], Meta(max_length=len(ReaderName))] = ()


class ReportBlock(Request, frozen=True):
    """LeaseHolder.report; one-way."""

    key: _Key
    generation: _U64
    outcome: ReadOutcome


class BeginPut(Request, frozen=True):
    """Open a put; the answer names what is lacking."""

    model: _U32
    names: WireNames
    group: _U16
    shard: _U16
    retention: Retention
    tenant: _U16 = EVERYBODY


class WriteBlocks(Request, frozen=True):
    """Hand over arena ranges of one window; answered when the arena may be reused."""

    put: _U32
    blocks: Annotated[tuple[WireArenaBlock, ...], Meta(min_length=1, max_length=WINDOW_BLOCKS_MAX)]


class PublishPut(Request, frozen=True):
    """Publish what was written."""

    put: _U32


class AbandonPut(Request, frozen=True):
    """Forfeit every reservation of a put."""

    put: _U32


class ListModels(Request, frozen=True):
    """Namespace.models, behind the name *after*."""

    after: _Name = ""
    limit: _Listed = 128


class ListHeads(Request, frozen=True):
    """Namespace.heads."""

    model: _U32
    after: _Hash | None = None
    limit: _Listed = 1000


class ListSessions(Request, frozen=True):
    """Namespace.sessions."""

    model: _U32
    after: _Hash | None = None
    limit: _Listed = 1000


class ListDetached(Request, frozen=True):
    """Namespace.detached, in order of the packed keys, behind *after*."""

    model: _U32
    after: _Key | None = None
    limit: _Listed = LISTED_MAX


class ListChain(Request, frozen=True):
    """Namespace.chain_of, from its row *first* on."""

    model: _U32
    prefix_hash: _Hash
    first: _U32 = 0
    limit: _Listed = LISTED_MAX


class InfoOfBlock(Request, frozen=True):
    """Namespace.block_info."""

    key: _Key


class ReadPayload(Request, frozen=True):
    """Namespace.read_block; answered by several pieces."""

    info: WireBlockInfo


class RemoveSession(Request, frozen=True):
    """Namespace.remove."""

    model: _U32
    head: _Hash
    below: bool = False


class RetainSession(Request, frozen=True):
    """Namespace.set_retention."""

    model: _U32
    head: _Hash
    retention: Retention


class EvictBytes(Request, frozen=True):
    """Namespace.evict."""

    wanted_bytes: _U64


class ExplainNames(Request, frozen=True):
    """Namespace.explain."""

    model: _U32
    names: WireNames
    tenant: _U16 = EVERYBODY


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

    id: _U32


class Welcome(Reply, frozen=True):
    """The answer to a hello; the descriptors come with its first byte: devices, then the arena."""

    version: int
    warehouse: _Hash
    devices: tuple[WireDevice, ...]
    arena_bytes: _U64


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
    """A model; *salt* is its tenant's secret, for a peer that may act for it."""

    model: WireModel
    tenant: _U16 = EVERYBODY
    salt: Annotated[bytes, Meta(max_length=SALT_BYTES)] = b""

    def __repr__(self) -> str:
        return f"Opened(id={self.id}, model={self.model}, tenant={self.tenant})"


class Counted(Reply, frozen=True):
    """A number; None where a lease is over or nothing matched."""

    count: int | None


class LocatedBlocks(Reply, frozen=True):
    """A lease and where its blocks lie: LOCATED_DTYPE and EXTENT_DTYPE rows as bytes."""

    token: _Token
    model: _U32
    start: _U32
    blocks: _U32
    located: bytes
    extents: bytes
    term_ms: _U64
    tenant: _U16 = EVERYBODY


class PutBegun(Reply, frozen=True):
    """A put is open; *lacking* are packed u32 LE indices."""

    put: _U32
    lacking: bytes


class PutDone(Reply, frozen=True):
    """Outcomes of a put: one byte per name, its place in PutOutcome."""

    outcomes: bytes
    written_bytes: _U64


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
    Hello | OpenModel | NewEpoch | MatchNames | JoinLease | LookupNames | TouchNames | RenewLease
    | ReleaseLease | ReportBlock | BeginPut | WriteBlocks | PublishPut | AbandonPut | ListModels
    | ListHeads | ListSessions | ListDetached | ListChain | InfoOfBlock | ReadPayload
    | RemoveSession | RetainSession | EvictBytes | ExplainNames | AskSpace | CheckAll | AskStatus
    | AskChanges | AskDevices | Operate
)  # fmt: skip
AnyReply = (
    Welcome | DeviceTable | Failed | Done | Opened | Counted | LocatedBlocks | PutBegun | PutDone
    | ModelRows | HashRows | KeyRows | SessionRows | BlockRows | Piece | Explained | SpaceFigures
    | Checked | Status | Operated
)  # fmt: skip
