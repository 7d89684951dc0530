"""The limits of messages, and the values in them as they travel; messages.py has the messages.

Not a place for behaviour: conversions are in codec.py. All are immutable.
"""

from typing import Annotated, Final

from msgspec import Meta, Struct

from twfs.hints import RETURN_MS_MAX, SESSION_BYTES_MAX, Retention, Stop, flaw_of
from twfs.records import BLOCK_KEY
from twfs.store import ReaderName
from twfs.units import BLOCK_BYTES_MAX, DIGEST_BYTES, HASH_BYTES, KEY_BYTES_MAX, NAME_BYTES_MAX

PROTOCOL_VERSION: Final = 3
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

U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack has no larger integer
Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Key = Annotated[bytes, Meta(min_length=BLOCK_KEY.size, max_length=BLOCK_KEY.size)]
Token = Annotated[bytes, Meta(min_length=1, max_length=TOKEN_BYTES_MAX)]
ModelName = Annotated[str, Meta(max_length=NAME_BYTES_MAX)]
ServedRow = tuple[ReaderName, U32, U64]  # blocks, payload bytes
SessionName = Annotated[str, Meta(min_length=1, max_length=SESSION_BYTES_MAX)]
LayoutJson = Annotated[bytes, Meta(max_length=LAYOUT_BYTES_MAX)]
Listed = Annotated[int, Meta(ge=1, le=LISTED_MAX)]


class WireNames(Struct, array_like=True, frozen=True):
    """Names as they travel; *positions* are packed u32 LE."""

    hashes: bytes
    digests: bytes
    parents: bytes
    positions: bytes
    keys: tuple[Annotated[bytes, Meta(max_length=KEY_BYTES_MAX)], ...] = ()
    public: U32 = 0  # leading ones of the tenant's share group

    def __post_init__(self) -> None:
        count = len(self.positions) // 4
        lengths = (len(self.hashes), len(self.digests), len(self.parents), len(self.positions))
        if lengths != (HASH_BYTES * count, DIGEST_BYTES * count, HASH_BYTES * count, 4 * count):
            raise ValueError(f"names have hashes, digests, parents, positions of {lengths} bytes")
        if count > BLOCKS_MAX or len(self.keys) not in {0, count}:
            raise ValueError(f"{count} names with {len(self.keys)} keys; at most {BLOCKS_MAX}")
        if self.public > count:
            raise ValueError(f"{self.public} of {count} names are said to be public")


class WireHint(Struct, array_like=True, frozen=True):
    """A Hint as it travels."""

    session: str = ""
    retention: Retention | None = None
    stop: Stop | None = None
    return_ms: Annotated[int, Meta(ge=0, le=RETURN_MS_MAX)] | None = None

    def __post_init__(self) -> None:
        flaw = flaw_of(self.session, self.return_ms)
        if flaw:
            raise ValueError(flaw)


class WireArenaBlock(Struct, array_like=True, frozen=True):
    """An ArenaBlock as it travels."""

    index: U32
    arena_offset: U64
    payload_bytes: Annotated[int, Meta(ge=1, le=BLOCK_BYTES_MAX)]
    xxh3: Hash
    lane_plain: U64
    lane_weighted: U64


class WireBlockInfo(Struct, array_like=True, frozen=True):
    """A BlockInfo as it travels: packed key and record, and what is not in them."""

    key: Key
    record: Annotated[bytes, Meta(max_length=1024)]
    index: U32
    last_use_ms: U64
    links: U32


class WireModel(Struct, array_like=True, frozen=True):
    """A Model as it travels; the layout is its to_dict as JSON."""

    id: U32
    name: ModelName
    epoch: U64
    layout: LayoutJson


class WireModelInfo(Struct, array_like=True, frozen=True):
    """A ModelInfo as it travels."""

    model: WireModel
    created_ms: U64
    blocks: U64
    heads: U64
    device_bytes: U64


class WireDevice(Struct, array_like=True, frozen=True):
    """One row of the device table; *passed* tells whether a descriptor of it came along."""

    index: U16
    uuid: Hash
    path: str
    size_bytes: U64
    passed: bool
