"""What engines import: a Store over the daemon's socket, whose reads go straight to the devices.

A daemon that is gone, slow or of another epoch means misses, counted by cause, and never an
exception in an engine's loop. Blocking and thread-safe; connect after fork, never before.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

import numpy as np

from twfs.copying import Copying
from twfs.datapath.match import Match
from twfs.datapath.upload import check_payloads, upload
from twfs.errors import (
    InvalidInput,
    LayoutMismatch,
    LeaseEnded,
    NoDaemon,
    NoSuchModel,
    ProtocolError,
    QuotaExceeded,
    StaleEpoch,
    TooLarge,
    TwfsError,
    WarehouseFull,
)
from twfs.hints import NO_HINT, Hint, check_session
from twfs.index.leases import Located
from twfs.layout import Layout
from twfs.metadata.meter import check_prefill
from twfs.prefix import Names
from twfs.protocol.codec import (
    error_of,
    hint_to_wire,
    layout_to_json,
    model_of,
    model_to_wire,
    names_to_wire,
    rows_of,
)
from twfs.protocol.holding import Held, boottime_s
from twfs.protocol.link import Connector, Link, RemotePut
from twfs.protocol.messages import (
    AnyReply,
    Counted,
    CountPrefill,
    Failed,
    ForgetSession,
    JoinLease,
    LocatedBlocks,
    LookupNames,
    MatchNames,
    NewEpoch,
    Opened,
    OpenModel,
    ReleaseLease,
    Request,
    TouchNames,
)
from twfs.protocol.remote import RemoteNamespace
from twfs.protocol.wire import BLOCKS_MAX
from twfs.readers.select import Readers
from twfs.records import EXTENT_DTYPE, LOCATED_DTYPE, BlockKey
from twfs.store import (
    Model,
    Pieces,
    PutOutcome,
    PutResult,
    ReadOutcome,
    Retention,
    Served,
)
from twfs.tenants import EVERYBODY
from twfs.units import ByteCount, DeviceIndex, ModelId

ARENA_BYTES: Final = 128 << 20  # eight windows of 16 MiB: some fill while others are written
HELLO_SECONDS_MAX: Final = 5.0  # for the first connection, which no engine's loop waits for
BLOCK_SECONDS: Final = 20e-6  # that a match may take longer per block asked for
WRITERS_MAX: Final = 8  # windows of all puts that wait for their answer at once
RAISED_BY_PUT: Final = (
    InvalidInput, LayoutMismatch, NoSuchModel, StaleEpoch, TooLarge, WarehouseFull,
)  # fmt: skip


def connect(
    socket_path: Path | str,
    *,
    arena_bytes: int = ARENA_BYTES,
    hugetlb: bool = False,
    connect_timeout_s: float = 0.05,
    match_timeout_s: float = 0.05,
) -> "Client":
    """Connect to the daemon at *socket_path*.

    Puts go through shared memory of *arena_bytes*, 0 for a client that only reads; with *hugetlb*
    it is asked for in huge pages. Later reconnects take up to *connect_timeout_s*, a match up to
    *match_timeout_s* and 20 us per block; after that they are misses. NoDaemon if nobody answers;
    ProtocolError on another version; NotAllowed; TooLarge.
    """
    client = Client(
        Path(socket_path), arena_bytes=arena_bytes, hugetlb=hugetlb,
        connect_timeout_s=connect_timeout_s, match_timeout_s=match_timeout_s,
    )  # fmt: skip
    client.reconnect(max(HELLO_SECONDS_MAX, connect_timeout_s))
    return client


class Client(RemoteNamespace):
    """A Store, a Namespace and a LeaseHolder over the socket; make it with connect."""

    def __init__(
        self, path: Path, *, arena_bytes: int, hugetlb: bool, connect_timeout_s: float,
        match_timeout_s: float,
    ) -> None:  # fmt: skip
        self._connector = Connector(
            path, arena_bytes=arena_bytes, hugetlb=hugetlb, timeout_s=connect_timeout_s,
            on_late=self._take_late,
        )  # fmt: skip
        self._match_timeout_s = match_timeout_s
        self._lock = threading.Lock()
        self._models: dict[ModelId, tuple[dict[int, Model], UUID]] = {}  # by number and tenant
        self._counts: Counter[str] = Counter()
        self._held = Held(self._connector, match_timeout_s, self._counts)
        self._misses: Counter[str] = Counter()
        self._writers: ThreadPoolExecutor | None = None

    # Connection

    def reconnect(self, timeout_s: float) -> None:
        """Connect anew within *timeout_s* seconds if the connection has ended; errors as connect.

        Nobody needs to call it: every call reconnects by itself, at most ten times a second.
        """
        self._connector.connect(timeout_s)

    def _link_for(self, model: Model) -> Link:
        """The connection, if *model* was opened in the warehouse behind it; NoDaemon, StaleEpoch.

        A number of a model means something else in another warehouse.
        """
        link = self._connector.link()
        known = self._models.get(model.id)
        if known is not None and known[1] != link.warehouse:
            raise StaleEpoch(f"model {model.name} is of another warehouse: open it again")
        return link

    def _request(self, request: Request, timeout_s: float | None) -> AnyReply | None:
        return self._connector.link().channel.call(request, timeout_s)

    def _request_pieces(
        self, request: Request, timeout_s: float | None
    ) -> Iterator[AnyReply | None]:
        return self._connector.link().channel.pieces(request, timeout_s)

    def device_paths(self) -> dict[DeviceIndex, Path]:
        """See Namespace.device_paths; as the last table of the daemon's has them."""
        devices = self._connector.devices
        rows = () if devices is None else devices.rows
        return {DeviceIndex(row.index): Path(row.path) for row in rows if row.passed}

    def close(self) -> None:
        """End all leases, wait for reads and puts under way, let go of everything. Idempotent."""
        self._connector.close()
        if self._writers is not None:
            self._writers.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Store

    def open_model(
        self, name: str, layout: Layout | None = None, *, tenant: str | None = None
    ) -> Model:
        """See Store.open_model; NoDaemon when nobody answers."""
        request = OpenModel(0, name, None if layout is None else layout_to_json(layout), tenant)
        opened = self._ask(request, Opened)
        return self._remember(opened, opened.tenant, opened.salt, opened.public_salt)

    def new_epoch(self, model: Model) -> Model:
        """See Store.new_epoch; NoDaemon when nobody answers."""
        self._link_for(model)
        opened = self._ask(NewEpoch(0, model_to_wire(model)), Opened)
        return self._remember(opened, model.tenant, model.salt, model.public_salt)

    def _remember(self, opened: Opened, tenant: int, salt: bytes, public: bytes) -> Model:
        """Note in which warehouse a model was opened, and for which tenants."""
        model = replace(model_of(opened.model), tenant=tenant, salt=salt, public_salt=public)
        warehouse = self._connector.link().warehouse
        with self._lock:
            before = self._models.get(model.id)
            known = dict(before[0]) if before is not None and before[1] == warehouse else {}
            self._models[model.id] = ({**known, tenant: model}, warehouse)
        return model

    def match(self, model: Model, names: Names, *, start: int = 0) -> Match:
        """See Store.match; at most the first 16384 names are asked for."""
        asked = names.head(BLOCKS_MAX) if len(names) > BLOCKS_MAX else names
        if not start >= 0:
            raise InvalidInput(f"a match from block {start} on")
        if start >= len(asked):
            return self._miss(model, names, start, None)
        wire = names_to_wire(asked)
        timeout_s = self._match_timeout_s + BLOCK_SECONDS * len(asked)
        try:
            link = self._link_for(model)
            before_s = boottime_s()
            reply = link.channel.call(MatchNames(0, model.id, wire, start, model.tenant), timeout_s)
            if isinstance(reply, LocatedBlocks):
                return self._match_of(
                    link, reply, model, names, before_s=before_s, asked=len(asked)
                )
            return self._miss(model, names, start, _cause_of(reply))
        except (NoDaemon, ProtocolError, StaleEpoch) as error:
            return self._miss(model, names, start, _cause_of(error))

    def _match_of(
        self, link: Link, reply: LocatedBlocks, model: Model, names: Names, *,
        before_s: float, asked: int,
    ) -> Match:  # fmt: skip
        """Return the match that *reply* grants, its lease counted from *before_s* on."""
        if not link.knows(_devices_of(reply)):
            self._give_back(link, reply)
            return self._miss(model, names, reply.start, "unknown device")
        try:
            located, extents = rows_of(reply, link.devices.sizes, asked)
        except ProtocolError as error:
            link.channel.end(error)
            raise
        self._held.enter(link, reply, before_s + reply.term_ms / 1000)
        with self._lock:
            self._counts["matches"] += 1
            self._counts["matched_blocks"] += reply.blocks - reply.start
        return Match(
            self, reply.token, model, names, reply.start, reply.blocks, located, extents,
            link.devices.readers,
        )  # fmt: skip

    def _give_back(self, link: Link, reply: LocatedBlocks) -> None:
        """Release the lease of *reply*, which is of no use here."""
        link.channel.tell(ReleaseLease(0, reply.token), self._match_timeout_s)

    def _miss(self, model: Model, names: Names, start: int, cause: str | None) -> Match:
        """Return a match of nothing, counted under *cause*."""
        if cause is not None:
            with self._lock:
                self._misses[cause] += 1
        devices = self._connector.devices
        return Match(
            self, b"", model, names, start, start, np.zeros(0, LOCATED_DTYPE),
            np.zeros(0, EXTENT_DTYPE), Readers({}) if devices is None else devices.readers,
        )  # fmt: skip

    def join(self, token: bytes) -> Match:
        """See Store.join; the names of the match are its hashes alone."""
        try:
            link = self._connector.link()
            before_s = boottime_s()
            reply = link.channel.call(JoinLease(0, token), self._match_timeout_s)
        except NoDaemon as error:
            raise LeaseEnded(f"the lease is over: {error}") from error
        if isinstance(reply, Failed):  # over, or more than this client may hold: a miss either way
            raise LeaseEnded(reply.text) from error_of(reply)
        if not isinstance(reply, LocatedBlocks):
            raise LeaseEnded("the daemon did not answer in time whether the lease holds")
        try:
            return self._joined(link, reply, before_s)
        except (NoDaemon, ProtocolError, LeaseEnded) as error:
            link.channel.tell(ReleaseLease(0, token), self._match_timeout_s)
            raise LeaseEnded(f"the lease cannot be joined: {error}") from error

    def _joined(self, link: Link, reply: LocatedBlocks, before_s: float) -> Match:
        """Return the match of a lease that was joined; NoDaemon, ProtocolError, LeaseEnded."""
        model = self._model_numbered(ModelId(reply.model), reply.tenant)
        if not link.knows(_devices_of(reply)):
            raise LeaseEnded("its blocks are on a device that this client does not have yet")
        located, extents = rows_of(reply, link.devices.sizes, reply.blocks)
        names = Located(
            reply.token, model.id, reply.start, reply.blocks, located, extents, reply.term_ms
        ).names(model.layout)
        return self._match_of(link, reply, model, names, before_s=before_s, asked=reply.blocks)

    def _model_numbered(self, number: ModelId, tenant: int) -> Model:
        """The model *number*, without the salt if it was not opened for *tenant*; LeaseEnded."""
        known = self._models.get(number)
        if known is None:
            warehouse = self._connector.link().warehouse
            for info in self.models():
                model = Model(info.id, info.name, info.epoch, info.layout)
                self._models[info.id] = ({EVERYBODY: model}, warehouse)
            known = self._models.get(number)
        if known is None:
            raise LeaseEnded(f"the lease is on model {number}, whose epoch is over")
        opened = known[0]
        other = next(iter(opened.values()))
        return opened.get(tenant) or replace(other, tenant=tenant, salt=b"", public_salt=b"")

    def lookup(self, model: Model, names: Names, *, start: int = 0) -> int:
        """See Store.lookup; *start* when nobody answers in time."""
        asked = names.head(BLOCKS_MAX)
        if start >= len(asked):
            return start
        timeout_s = self._match_timeout_s + BLOCK_SECONDS * len(asked)
        request = LookupNames(0, model.id, names_to_wire(asked), start, model.tenant)
        try:
            reply = self._link_for(model).channel.call(request, timeout_s)
        except (NoDaemon, StaleEpoch) as error:
            reply, cause = None, _cause_of(error)
        else:
            cause = _cause_of(reply)
        if isinstance(reply, Counted) and reply.count is not None:
            return reply.count
        with self._lock:
            self._misses[cause or "refused"] += 1
        return start

    def touch(self, model: Model, names: Names, hint: Hint = NO_HINT) -> None:
        """See Store.touch; lost when nobody takes it in time."""
        told = hint_to_wire(hint)
        for first in range(0, len(names), BLOCKS_MAX):
            part = names_to_wire(names.slice(first, first + BLOCKS_MAX))
            try:
                link = self._link_for(model)
                # The session is where the last part ends: it alone says more than a use.
                last = first + BLOCKS_MAX >= len(names)
                request = TouchNames(0, model.id, part, model.tenant, told if last else None)
                sent = link.channel.tell(request, self._match_timeout_s)
            except (NoDaemon, StaleEpoch):
                sent = False
            with self._lock:
                self._counts["touches" if sent else "touches_lost"] += 1

    def count_prefill(self, model: Model, tokens: int, seconds: float) -> None:
        """See Store.count_prefill; lost when nobody takes it in time."""
        check_prefill(tokens, seconds)
        with suppress(NoDaemon, StaleEpoch):
            request = CountPrefill(0, model.id, tokens, seconds)
            self._link_for(model).channel.tell(request, self._match_timeout_s)

    def put(
        self, model: Model, names: Names, payloads: Sequence[Pieces], *,
        group: int = 0, shard: int = 0, retention: Retention = Retention.STANDARD,
        hint: Hint = NO_HINT,
        copying: Copying | None = None,
    ) -> PutResult:  # fmt: skip
        """See Store.put; a dead or failing daemon gives the outcome FAILED.

        TooLarge if a block does not fit the arena.
        """
        check_payloads(model.layout, group, payloads)
        if len(payloads) != len(names):
            raise InvalidInput(f"{len(payloads)} payloads for {len(names)} names")
        if not 0 <= shard < model.layout.shards:
            raise InvalidInput(f"shard {shard} of {model.layout.shards}")
        outcomes: list[PutOutcome] = []
        written = 0
        if copying is not None and len(names) > BLOCKS_MAX:
            copying.begin()  # the last part ends it; the ones before read, too
        for first in range(0, len(names), BLOCKS_MAX):
            part = names.slice(first, first + BLOCKS_MAX)
            last = first + BLOCKS_MAX >= len(names)
            try:
                result = self._put_part(
                    model, part, payloads[first : first + BLOCKS_MAX], group=group, shard=shard,
                    retention=retention, hint=hint, copying=copying if last else None,
                )  # fmt: skip
            except RAISED_BY_PUT as error:
                if not outcomes:
                    raise
                over = isinstance(error, QuotaExceeded)
                why = PutOutcome.OVER_QUOTA if over else PutOutcome.NO_ROOM
                result = PutResult((why,) * len(part), ByteCount(0))
            except TwfsError as error:
                with self._lock:
                    self._misses[f"put: {_cause_of(error)}"] += 1
                result = PutResult((PutOutcome.FAILED,) * len(part), ByteCount(0))
            outcomes += result.outcomes
            written += result.written_bytes
        return PutResult(tuple(outcomes), ByteCount(written))

    def _put_part(
        self, model: Model, names: Names, payloads: Sequence[Pieces], *,
        group: int, shard: int, retention: Retention, hint: Hint, copying: Copying | None,
    ) -> PutResult:  # fmt: skip
        """One put over the connection as it is now."""
        link = self._link_for(model)
        if link.arena is None:
            raise InvalidInput("this client was connected with arena_bytes=0: it only reads")
        self._connector.arenas.enter(link)
        try:
            port = RemotePut(
                link, self._executor(), model.id, names,
                group=group, shard=shard, retention=retention, tenant=model.tenant, hint=hint,
            )  # fmt: skip
            return upload(port, link.arena, model.layout, group, payloads, copying=copying)
        finally:
            self._connector.arenas.leave(link)

    def _executor(self) -> ThreadPoolExecutor:
        """The threads that wait for windows to be written."""
        with self._lock:
            if self._writers is None:
                self._writers = ThreadPoolExecutor(WRITERS_MAX, "twfs-write")
            return self._writers

    def forget(self, model: Model, session: str) -> ByteCount:
        """See Store.forget; NoDaemon when nobody answers."""
        check_session(session)
        self._link_for(model)
        return ByteCount(self._count(ForgetSession(0, model.id, session, model.tenant), None))

    # LeaseHolder

    def held(self, token: bytes) -> bool:
        """See LeaseHolder.held; asks the kernel, not the daemon."""
        return self._held.held(token)

    def release(self, token: bytes, served: Sequence[Served] = ()) -> None:
        """See LeaseHolder.release."""
        self._held.release(token, served)

    def renew(self, token: bytes) -> bool:
        """See LeaseHolder.renew."""
        return self._held.renew(token)

    def report(self, key: BlockKey, generation: int, outcome: ReadOutcome) -> None:
        """See LeaseHolder.report."""
        self._held.report(key, generation, outcome)

    def _take_late(self, reply: AnyReply) -> None:
        """A reply that nobody waits for any more; the connector is made before who holds leases."""
        self._held.take_late(reply)

    def statistics(self) -> dict[str, Any]:
        """The daemon's statistics, if it answers, and under `client` this client's own."""
        statistics: dict[str, Any] = {}
        with suppress(TwfsError):
            statistics = self._daemon_statistics()
        own = self._connector.statistics()
        with self._lock:
            own |= self._counts
            own |= {"misses": dict(self._misses), "leases": len(self._held)}
        return {**statistics, "client": own}


def _cause_of(answer: AnyReply | TwfsError | None) -> str | None:
    """The name under which a miss is counted; None for one that is the daemon's honest answer."""
    if answer is None:
        return "timed out"
    if isinstance(answer, Failed):
        answer = error_of(answer)
    if isinstance(answer, StaleEpoch | NoSuchModel):
        return "stale epoch"
    if isinstance(answer, NoDaemon):
        return "no daemon"
    return None if isinstance(answer, Counted) else "refused"


def _devices_of(reply: LocatedBlocks) -> list[int]:
    """The numbers of the devices that *reply* names; what is no row is found out by rows_of."""
    whole = len(reply.extents) // EXTENT_DTYPE.itemsize
    numbers: list[int] = np.unique(
        np.frombuffer(reply.extents, EXTENT_DTYPE, whole)["device"]
    ).tolist()
    return numbers
