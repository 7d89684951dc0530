"""The interface that engines, the mount and the tools see, whichever way in they came.

`Warehouse` (in-process, exclusive) and `Client` (a socket to the daemon) both are a `Store`; both
are blocking and thread-safe. A miss is never an exception: match, lookup, touch and reads answer
with counts and outcomes. Exceptions are for callers' mistakes (InvalidInput, LayoutMismatch) and
for a put that cannot be kept (WarehouseFull, StaleEpoch).
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from twfs.copying import Copying
from twfs.errors import InvalidInput
from twfs.hints import NO_HINT, Hint
from twfs.hints import Retention as Retention  # noqa: PLC0414 - of the interface
from twfs.layout import Layout
from twfs.prefix import Chain, Names, Root, root_of
from twfs.records import Block, BlockKey
from twfs.tenants import EVERYBODY, EVERYBODY_NAME, Tenants
from twfs.units import ByteCount, DeviceIndex, Millis, ModelId, PrefixHash, TokenCount

# A torch tensor (CPU, pinned, CUDA), numpy array, or anything with the buffer protocol; contiguous.
Buffer = Any
# One block's payload or destination: one buffer, or several pieces in payload order.
Pieces = Buffer | Sequence[Buffer]


class Durability(StrEnum):
    """When a publish returns: *strict* once no power cut can undo it, *relaxed* one commit sooner.

    Relaxed may lose the last commit, and nothing else: no other publish, no removal, no bytes.
    """

    STRICT = "strict"
    RELAXED = "relaxed"


@dataclass(frozen=True, slots=True)
class Model:
    """A model as opened: what chains and requests need to know of it."""

    id: ModelId
    name: str
    epoch: int
    layout: Layout
    tenant: int = EVERYBODY  # for whom it was opened: all requests with this model are theirs
    salt: bytes = field(default=b"", repr=False)  # that tenant's, a secret of 32 bytes
    public_salt: bytes = field(default=b"", repr=False)  # its share group's; empty: it is in none

    def root(self, salt: bytes = b"", *, public: bool = False) -> Root:
        """Where chains begin; *salt* separates more than tenants do, and is never stored.

        With *public* where those of the tenant's share group begin; InvalidInput if it is in none.
        """
        if public and not self.public_salt:
            raise InvalidInput(
                f"model {self.name} was opened for a tenant without a share group: an operator "
                "names one with `twfs tenant set --share`"
            )
        own = self.public_salt if public else self.salt
        return root_of(self.layout.fingerprint, self.epoch, own + salt)

    def chain(self, salt: bytes = b"", *, public_tokens: int = 0) -> Chain:
        """Return an empty chain, to be extended with token ids; *salt* as in root.

        Whole blocks of the first *public_tokens* (a system prompt, tools: nobody's secret) are
        shared with the tenants of the share group, and nothing behind them. InvalidInput if there
        is no group.
        """
        blocks = public_tokens // self.layout.block_tokens
        return Chain(
            self.root(salt, public=blocks > 0), self.layout.block_tokens,
            public_blocks=blocks, private=self.salt,
        )  # fmt: skip


class PutOutcome(StrEnum):
    """What became of one block of a put."""

    PUBLISHED = "published"
    PRESENT = "present"  # was there before, with the same digest
    COLLISION = "collision"  # there with another digest: refused, never mixed
    NO_ROOM = "no room"
    FAILED = "failed"  # its bytes did not reach the device, or not whole
    OVER_QUOTA = "over quota"  # no room in its tenant's quota
    NOT_ADMITTED = "not admitted"  # not worth writing now: a miss, and no failure


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a put did: one outcome per name, in their order."""

    outcomes: tuple[PutOutcome, ...]
    written_bytes: ByteCount

    @property
    def held(self) -> int:
        """Blocks of the longest leading part that is now in the store."""
        good = {PutOutcome.PUBLISHED, PutOutcome.PRESENT}
        return next(
            (i for i, outcome in enumerate(self.outcomes) if outcome not in good),
            len(self.outcomes),
        )


class ReaderName(StrEnum):
    """The ways by which bytes come from the devices into an engine's memory."""

    HOST = "host"
    STAGED = "staged"
    CUFILE = "cufile"


class ReadOutcome(StrEnum):
    """What became of one block of a read; everything but HIT is a miss, with its cause."""

    HIT = "hit"
    BAD_CHECKSUM = "bad checksum"
    DEVICE_ERROR = "device error"
    LEASE_ENDED = "lease ended"
    TIMED_OUT = "timed out"
    NOT_READ = "not read"  # behind a miss: a chain is useful up to its first gap only


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What a read did: one outcome per block asked for, in chain order."""

    outcomes: tuple[ReadOutcome, ...]
    reader: ReaderName
    payload_bytes: ByteCount  # delivered

    @property
    def blocks(self) -> int:
        """Blocks of the longest leading part that was delivered and verified."""
        return next(
            (i for i, outcome in enumerate(self.outcomes) if outcome is not ReadOutcome.HIT),
            len(self.outcomes),
        )


@dataclass(frozen=True, slots=True)
class Served:
    """What one reader delivered, verified."""

    reader: ReaderName
    blocks: int = 0
    payload_bytes: ByteCount = field(default=ByteCount(0))

    def plus(self, blocks: int, payload_bytes: int) -> "Served":
        """The same with so much more."""
        return Served(
            self.reader, self.blocks + blocks, ByteCount(self.payload_bytes + payload_bytes)
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as an operator sees it."""

    id: ModelId
    name: str
    epoch: int
    layout: Layout
    created_ms: Millis
    blocks: int
    heads: int
    device_bytes: ByteCount


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One head: a session as it stands. Own bytes are used by this head alone."""

    model: str
    head: PrefixHash
    tokens: TokenCount
    blocks: int
    payload_bytes: ByteCount
    own_bytes: ByteCount  # on the device, headers and padding included
    shared_bytes: ByteCount
    last_use_ms: Millis
    published_ms: Millis
    retention: Retention
    tenant: str = EVERYBODY_NAME
    ids: tuple[str, ...] = ()  # of the sessions with an engine's id that end here


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block as the mount shows it."""

    key: BlockKey
    block: Block
    index: int  # place in its chain, from 0
    last_use_ms: Millis
    links: int  # heads over it; at least 1


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the data areas of all devices."""

    total_bytes: ByteCount
    free_bytes: ByteCount
    limbo_bytes: ByteCount
    reserved_bytes: ByteCount
    evictable_bytes: ByteCount


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prefix is a hit so far and no farther."""

    hit_blocks: int
    hit_tokens: TokenCount
    asked_blocks: int
    first_miss: PrefixHash | None
    cause: str  # one sentence, for a person


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken invariant of FORMAT.md."""

    invariant: int
    text: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What the checker looked at, and what it found."""

    findings: tuple[Finding, ...]
    blocks: int
    payloads: int  # read and verified
    seconds: float


class LeasedMatch(Protocol):
    """The longest part of a chain that a store holds, under a lease; `match.Match` is one."""

    @property
    def blocks(self) -> int:
        """Blocks held, counted from the first of the prompt."""

    @property
    def tokens(self) -> TokenCount:
        """Tokens up to the end of the last held block."""

    @property
    def token(self) -> bytes:
        """What another process of this user joins the lease by; empty if nothing is held."""

    def read_into(
        self, destinations: Sequence[Pieces], *, group: int = 0, shard: int = 0,
        first: int | None = None, layers: range | None = None, reader: str | None = None,
        timeout_s: float | None = None,
    ) -> ReadReport:  # fmt: skip
        """Read one block into each destination; see Match.read_into."""

    def read_async(
        self, destinations: Sequence[Pieces], *, group: int = 0, shard: int = 0,
        first: int | None = None, layers: range | None = None, reader: str | None = None,
        timeout_s: float | None = None,
    ) -> "Future[ReadReport]":  # fmt: skip
        """As read_into, on another thread."""

    def read_ahead(self, *, group: int = 0, shard: int = 0) -> None:
        """Begin to read the first blocks before it is known where to; see Match.read_ahead."""

    def renew(self) -> bool:
        """Ask for a full lease term again."""

    def release(self) -> None:
        """Wait for reads under way and end the lease."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...  # fmt: skip


class Store(Protocol):
    """What engines use."""

    def open_model(
        self, name: str, layout: Layout | None = None, *, tenant: str | None = None
    ) -> Model:
        """Open the model *name* for *tenant* (None: everybody), made with *layout* if need be.

        LayoutMismatch if it has another layout (both are in the text); NoSuchModel if it is not
        there and no layout was given; NotAllowed if this user may not act for the tenant;
        NoSuchTenant.
        """

    def new_epoch(self, model: Model) -> Model:
        """Make all blocks of *model* unreachable (weights updated, cache reset); return it anew."""

    def match(self, model: Model, names: Names, *, start: int = 0) -> "LeasedMatch":
        """Return the longest part of *names* held from block *start* on, under a lease.

        Blocks before *start* are taken as held by the caller. Nothing held, an old epoch or no
        daemon: a Match of 0 blocks.
        """

    def join(self, token: bytes) -> "LeasedMatch":
        """Return the Match of another process's lease, held here too; LeaseEnded if it is over.

        Its model has the tenant's salt only where this store has opened the model for that tenant.
        """

    def lookup(self, model: Model, names: Names, *, start: int = 0) -> int:
        """Count the blocks that match would return, without lease and without counting a use."""

    def touch(self, model: Model, names: Names, hint: Hint = NO_HINT) -> None:
        """Count a use of these blocks, however they were served; one-way, nothing is waited for.

        With the whole chain of a request, *hint* moves its session to the last block that is held.
        """

    def count_prefill(self, model: Model, tokens: int, seconds: float) -> None:
        """Say that prefill of so many tokens of *model* took so long: its measured rate; one-way.

        It is what the store's hits are worth where no rate is given. InvalidInput beyond reason.
        """

    def put(
        self, model: Model, names: Names, payloads: Sequence[Pieces], *,
        group: int = 0, shard: int = 0, retention: Retention = Retention.STANDARD,
        hint: Hint = NO_HINT, copying: Copying | None = None,
    ) -> PutResult:  # fmt: skip
        """Store one payload per name; returns once what it reports is durable.

        *retention* is the class of a session that is new; *hint* names the session, and a class
        in it changes that of a session which is known.

        Only what the store lacks is copied; *copying* tells when that is done, long before the
        return, and can end it. InvalidInput on a payload that has not the layout's
        block_bytes or is not contiguous; WarehouseFull if not even the first lacking block fits,
        QuotaExceeded, which is one, if that is because of its tenant's quota.
        """

    def forget(self, model: Model, session: str) -> ByteCount:
        """Delete a session by its id, with every block that no other session uses; bytes of these.

        0 if there is no such session. InvalidInput if no id looks so; NoDaemon, StaleEpoch.
        """

    def close(self) -> None:
        """End all leases and I/O, and let go of everything."""


class Namespace(Protocol):
    """What the mount and the tools use, besides Store."""

    def models(self) -> list[ModelInfo]:
        """All models, by name."""

    def heads(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[PrefixHash]:
        """Up to *limit* heads in order of their hashes, beginning behind *after*."""

    def sessions(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[SessionInfo]:
        """As heads, with figures; the bytes add up to `du`'s."""

    def detached(self, model: ModelId) -> list[BlockKey]:
        """Published blocks whose parent is not there."""

    def chain_of(self, model: ModelId, prefix_hash: PrefixHash) -> list[BlockInfo]:
        """All blocks from the first to *prefix_hash*, by index, group, shard; NoSuchBlock."""

    def block_info(self, key: BlockKey) -> BlockInfo:
        """One block; NoSuchBlock."""

    def read_block(self, info: BlockInfo) -> memoryview:
        """The verified payload, read under a lease of its own. Blocks on the device.

        BlockGone if this life of the block is over; BadPayload or DeviceError if it is lost.
        """

    def remove(self, model: ModelId, head: PrefixHash, *, below: bool = False) -> ByteCount:
        """Unpublish a session from the tail up, every block that no other head uses.

        With *below* instead the block *head* itself, which need be none, and all that goes on from
        it. NoSuchBlock, or NotEmpty when *head* is not a head.
        """

    def set_retention(self, model: ModelId, head: PrefixHash, retention: Retention) -> None:
        """Give the sessions that end at *head* this class: those with an id, else the one without.

        A block has the highest class of the sessions over it. NoSuchBlock; PromiseRefused if more
        would be pinned than may be; TooLarge if too many sessions have a class of their own.
        """

    def retain(
        self, model: ModelId, session: str, retention: Retention, *, tenant: int = EVERYBODY
    ) -> None:
        """Give the session with an engine's id this class; errors as set_retention."""

    def evict(self, wanted_bytes: ByteCount) -> ByteCount:
        """Evict in order until about this much is free that was not; returns what it freed."""

    def explain(self, model: ModelId, names: Names, *, tenant: int = EVERYBODY) -> Explanation:
        """Say why *names* match for *tenant* as far as they do, and what is wrong behind."""

    def tenants(self) -> Tenants:
        """All tenants, and the rule of who may do what. NotAllowed to all but operators."""

    def space(self) -> Space:
        """Bytes on the devices."""

    def device_paths(self) -> Mapping[DeviceIndex, Path]:
        """Where each device is that can be read now."""

    def check(self, *, data: bool = False) -> CheckReport:
        """Check every invariant of FORMAT.md; with *data* every payload too."""

    def operate(self, verb: str, **arguments: Any) -> Any:
        """Run an operator's *verb* (see core/operating.py) with JSON-ready *arguments*; its result.

        InvalidInput, NotAllowed, and what the verb raises.
        """

    def statistics(self) -> dict[str, Any]:
        """All counters and gauges, JSON-ready; names are stable."""

    def changes(self) -> int:
        """A number that grows with every change of what the namespace lists."""


class LeaseHolder(Protocol):
    """What a Match needs of the store it came from."""

    def held(self, token: bytes) -> bool:
        """Tell whether the lease is held now: connection not ended, deadline not passed."""

    def release(self, token: bytes, served: Sequence[Served] = ()) -> None:
        """End this holder's part of the lease, and say what was read under it; never raises."""

    def renew(self, token: bytes) -> bool:
        """Ask for a full term again; False if it is over or at its age limit."""

    def report(self, key: BlockKey, generation: int, outcome: ReadOutcome) -> None:
        """Hint that a block read badly; the daemon re-reads and judges for itself."""


class PutPort(Protocol):
    """One put under way, as `upload` drives it. Used by one thread."""

    @property
    def lacking(self) -> Sequence[int]:
        """Indices into the names of blocks whose bytes are wanted, ascending."""

    def write(self, blocks: "Sequence[ArenaBlock]") -> "Future[None]":
        """Hand over arena ranges; done when the arena may be reused."""

    def publish(self) -> PutResult:
        """Flush and publish what was written; blocks until it is durable."""

    def abandon(self) -> None:
        """Give up: forfeit every reservation. Never raises; idempotent, also after publish."""


@dataclass(frozen=True, slots=True)
class ArenaBlock:
    """One block's payload, copied into a shared arena at a 4 KiB-aligned offset."""

    index: int  # into the put's names
    arena_offset: int
    payload_bytes: ByteCount
    xxh3: bytes
    lane_plain: int
    lane_weighted: int


def iterate_heads(store: Namespace, model: ModelId) -> Iterator[PrefixHash]:
    """All heads of *model*, asked for in bounded pieces."""
    after: PrefixHash | None = None
    while piece := store.heads(model, after=after):
        yield from piece
        after = piece[-1]


def iterate_sessions(store: Namespace, model: ModelId) -> Iterator[SessionInfo]:
    """All sessions of *model*, asked for in bounded pieces."""
    after: PrefixHash | None = None
    while piece := store.sessions(model, after=after):
        yield from piece
        after = piece[-1].head
