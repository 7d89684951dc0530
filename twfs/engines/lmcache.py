"""An L2 adapter plugin for LMCache's multiprocess mode (0.5): its L2 is then a twfs warehouse.

LMCache names blocks by hash, salt and rank and says nothing of their order; what one lookup asks
for in a row is taken for a chain, which is what `ls` shows and eviction respects. How to configure
it: docs/lmcache.md.
"""

import hashlib
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Final
from uuid import uuid4

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from twfs.engines.keyed import STORED, KeyedStore, blocks_of
from twfs.errors import NoSuchBlock
from twfs.layout import Arrangement, Group, Layout
from twfs.match import Match
from twfs.prefix import Names
from twfs.store import Model, ModelInfo, PutOutcome, ReadOutcome
from twfs.units import ByteCount

log = logging.getLogger(__name__)

ENGINE: Final = "lmcache"
READ_TIMEOUT_S: Final = 5.0  # then computing it again is sooner done
THREADS: Final = 4  # of lookups and loads; puts have two of their own
LISTINGS_MAX: Final = 16  # under way at once; older ones begin anew
TAG_BYTES: Final = 8

Row = tuple[str, int, int, str]  # model, rank, group, salt: blocks of one chain


@dataclass(slots=True)
class Held:
    """A match that a lookup got, and how many of its blocks are still locked."""

    match: Match
    locked: int


def row_of(key: ObjectKey) -> Row:
    """What *key* has in common with the keys of its chain."""
    return key.model_name, key.kv_rank, key.object_group_id, key.cache_salt


def layout_of(row: Row, shapes: Sequence[Any], dtypes: Sequence[Any], revision: str) -> Layout:
    """The layout of the blocks of *row*: all that LMCache tells of them is in its fingerprint.

    *shapes* and *dtypes* are of the tensors that lie one behind the other in a block; tokens are
    the last dimension but one of each. InvalidInput if that is no number of tokens.
    """
    name, rank, group, _ = row
    payload_bytes = sum(
        shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    texts = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    of = Group(
        1, dtype=texts[0], arrangement=Arrangement.OPAQUE, layer_bytes=ByteCount(payload_bytes)
    )
    return Layout(
        name, (of,), int(shapes[0][-2]), revision=revision, engine=ENGINE,
        overrides={
            "lmcache_rank": f"{rank:#x}", "lmcache_group": str(group),
            "shapes": ";".join("x".join(map(str, shape)) for shape in shapes),
            "dtypes": ";".join(texts),
        },
    )  # fmt: skip


class TwfsL2Adapter(L2AdapterInterface):  # type: ignore[misc] # LMCache ships no types
    """See the module's docstring.

    *params*: `socket` of the daemon; `revisions`, what tells the weights behind a model's name,
    by that name; `tenants`, whose blocks those of a salt are, by the salt; `timeout_s` of a load.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()  # of no capacity: the daemon evicts, and not LMCache's own watermark
        del l1_memory_desc  # loads are verified before they enter it
        self._store = KeyedStore(params["socket"])
        self._revisions: dict[str, str] = dict(params.get("revisions", {}))
        self._tenants: dict[str, str] = dict(params.get("tenants", {}))
        self._timeout_s: float | None = params.get("timeout_s", READ_TIMEOUT_S)
        self._events = [create_event_notifier() for _ in range(3)]  # store, lookup, load
        self._lock = threading.Lock()
        self._tasks = 0
        self._done: dict[int, Any] = {}  # bitmaps of lookups and loads
        self._stored: dict[int, L2StoreResult] = {}
        self._held: defaultdict[ObjectKey, deque[tuple[Held, int]]] = defaultdict(deque)
        self._sizes: dict[ObjectKey, int] = {}  # that LMCache was told are stored
        self._salts: dict[bytes, str] = {}  # by their tags, as far as they were seen
        self._listings: dict[str, Iterator[KeyEntry]] = {}
        self._ask = ThreadPoolExecutor(THREADS, "twfs-lmcache")
        self._putting = ThreadPoolExecutor(2, "twfs-lmcache-put")
        log.info("twfs: L2 of LMCache is the warehouse behind %s", params["socket"])

    def get_store_event_fd(self) -> int:
        """See L2AdapterInterface."""
        return int(self._events[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """See L2AdapterInterface."""
        return int(self._events[1].fileno())

    def get_load_event_fd(self) -> int:
        """See L2AdapterInterface."""
        return int(self._events[2].fileno())

    def _begin(self) -> int:
        with self._lock:
            self._tasks += 1
            return self._tasks

    # Store

    def submit_store_task(self, keys: list[ObjectKey], memory: list[Any]) -> int:
        """See L2AdapterInterface; *memory* are its MemoryObj, one a key."""
        task = self._begin()
        self._putting.submit(self._do_store, task, keys, memory)
        return task

    def _do_store(self, task: int, keys: list[ObjectKey], memory: list[Any]) -> None:
        good, stored, written = True, dict[ObjectKey, int](), 0
        pairs = zip(keys, memory, strict=True)
        for row, part in groupby(pairs, lambda pair: row_of(pair[0])):
            some, blocks = zip(*part, strict=True)
            outcomes: Sequence[PutOutcome] = [PutOutcome.FAILED] * len(some)
            with self._store.guarded("store"):
                model = self._model(row, blocks[0].get_shapes(), blocks[0].get_dtypes())
                if model is not None:
                    names = self._names(model, row, some)
                    payloads = [block.byte_array for block in blocks]
                    outcomes = self._store.put(model, names, payloads)
            good = good and STORED.issuperset(outcomes)
            for key, block, outcome in zip(some, blocks, outcomes, strict=True):
                if outcome in STORED and key not in self._sizes:
                    stored[key] = block.get_size()
                written += block.get_size() if outcome is PutOutcome.PUBLISHED else 0
        with self._store.guarded("notify"):
            if stored:
                self._sizes |= stored
                self._notify_keys_stored(list(stored), list(stored.values()))
        with self._lock:
            self._stored[task] = L2StoreResult(good, written)
        self._events[0].notify()

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """See L2AdapterInterface."""
        with self._lock:
            done, self._stored = self._stored, {}
        return done

    # Lookup

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """See L2AdapterInterface; keys of one model, rank, group and salt are a chain."""
        task = self._begin()
        self._ask.submit(self._do_lookup, task, keys, group_layout_descs)
        return task

    def _do_lookup(self, task: int, keys: list[ObjectKey], descs: Any) -> None:
        bitmap, at = Bitmap(len(keys)), 0
        for row, part in groupby(keys, row_of):
            some = list(part)
            with self._store.guarded("lookup"):
                desc = descs[row[2]]
                model = self._model(row, desc.shapes, desc.dtypes)
                hits = 0 if model is None else self._lock_row(model, row, some)
                for index in range(at, at + hits):
                    bitmap.set(index)
                if model is not None and any(key in self._sizes for key in some[hits:]):
                    self._miss(model, row, some)
            at += len(some)
        self._finish(1, task, bitmap)

    def _lock_row(self, model: Model, row: Row, keys: list[ObjectKey]) -> int:
        """Match a chain, note its lease under the keys that it holds, and return how many."""
        self._store.places.learn([key.chunk_hash for key in keys], model.layout.block_tokens)
        match = self._store.client.match(model, self._names(model, row, keys))
        held = Held(match, match.blocks)
        with self._lock:
            for index, key in enumerate(keys[: match.blocks]):
                self._held[key].append((held, index))
        return match.blocks

    def _miss(self, model: Model, row: Row, keys: list[ObjectKey]) -> None:
        """Tell LMCache what of *keys* the daemon has evicted; it is asked, for it may be away."""
        names = self._names(model, row, keys)
        hits = self._store.client.explain(model.id, names, tenant=model.tenant).hit_blocks
        self._notify_gone(keys[hits:])

    def _notify_gone(self, keys: Sequence[ObjectKey]) -> None:
        gone = {key: self._sizes.pop(key) for key in keys if key in self._sizes}
        if gone:
            self._notify_keys_deleted(list(gone), list(gone.values()))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """See L2AdapterInterface."""
        with self._lock:
            return self._done.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """See L2AdapterInterface; the lease ends with the last of its blocks."""
        over = []
        with self._lock:
            for key in keys:
                locks = self._held.get(key)
                if locks:
                    held, _ = locks.popleft()
                    held.locked -= 1
                    over += [held.match] if not held.locked else []
                if not locks:
                    self._held.pop(key, None)
        for match in over:
            self._ask.submit(match.release)

    # Load

    def submit_load_task(self, keys: list[ObjectKey], memory: list[Any]) -> int:
        """See L2AdapterInterface; *memory* are its MemoryObj, one a key."""
        task = self._begin()
        self._ask.submit(self._do_load, task, keys, memory)
        return task

    def _do_load(self, task: int, keys: list[ObjectKey], memory: list[Any]) -> None:
        bitmap = Bitmap(len(keys))
        with self._lock:
            places = [self._held[key][0] if key in self._held else None for key in keys]
        for run in _runs(places):
            with self._store.guarded("load"):
                held, first = places[run[0]] or (None, 0)
                if held is None:
                    continue  # never looked up, or unlocked since
                into = [memory[index].byte_array for index in run]
                report = held.match.read_into(into, first=first, timeout_s=self._timeout_s)
                for index, outcome in zip(run, report.outcomes, strict=True):
                    self._store.count(f"loaded: {outcome}")
                    if outcome is ReadOutcome.HIT:
                        bitmap.set(index)
        with self._store.guarded("notify"):
            if used := bitmap.gather(keys):
                self._notify_keys_accessed(used)
        self._finish(2, task, bitmap)

    def query_load_result(self, task_id: int) -> Any:
        """See L2AdapterInterface."""
        return self.query_lookup_and_lock_result(task_id)

    def _finish(self, event: int, task: int, bitmap: Any) -> None:
        with self._lock:
            self._done[task] = bitmap
        self._events[event].notify()

    # Models and names

    def _model(self, row: Row, shapes: Sequence[Any], dtypes: Sequence[Any]) -> Model | None:
        """The model of *row*, None while nobody answers."""
        layout = layout_of(row, shapes, dtypes, self._revisions.get(row[0], ""))
        return self._store.model(row[0], layout, self._tenants.get(row[3]))

    def _names(self, model: Model, row: Row, keys: Sequence[ObjectKey]) -> Names:
        """Names of the *keys* of *row*; its salt enters them, and a tag of it ends their keys."""
        salt = row[3].encode()
        tag = bytes(TAG_BYTES)
        if salt:
            tag = hashlib.blake2b(salt, digest_size=TAG_BYTES, key=model.salt).digest()
        self._salts[tag] = row[3]
        return self._store.names(model, [key.chunk_hash for key in keys], salt, tag)

    # What an operator asks through LMCache

    def _models(self, name: str | None) -> Iterator[tuple[ModelInfo, int, int]]:
        """Our models of LMCache's model *name* (None: of all), with their rank and group."""
        for info in self._store.client.models():
            if info.layout.engine == ENGINE and name in {None, info.layout.model}:
                overrides = info.layout.overrides
                yield info, int(overrides["lmcache_rank"], 16), int(overrides["lmcache_group"])

    def delete(self, keys: list[ObjectKey]) -> None:
        """See L2AdapterInterface; what goes on from a block goes with it, for nothing finds it."""
        for row, part in groupby(keys, row_of):
            some = list(part)
            with self._store.guarded("delete"):
                for info, rank, group in self._models(row[0]):
                    if (rank, group) == row[1:3]:
                        self._delete(info.layout, row, some)
                self._notify_gone(some)

    def _delete(self, layout: Layout, row: Row, keys: list[ObjectKey]) -> None:
        model = self._store.model(row[0], layout, self._tenants.get(row[3]))
        if model is not None:
            names = self._names(model, row, keys)
            for index in range(len(names)):
                with suppress(NoSuchBlock):
                    self._store.client.remove(model.id, names.hash_at(index), below=True)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """See L2AdapterInterface; blocks of a salt that was not seen since the start are left out.

        A cursor is good once, and until this process ends: ValueError.
        """
        listing = self._list(model_name) if cursor is None else self._listings.pop(cursor, None)
        if listing is None or page_size <= 0:
            raise ValueError("no such cursor, or no positive size: list from the beginning")
        found = tuple(islice(listing, page_size))
        token = None
        if len(found) == page_size:
            token = uuid4().hex
            self._listings[token] = listing
            for old in list(self._listings)[:-LISTINGS_MAX]:
                del self._listings[old]
        return KeyListPage(found, token)

    def _list(self, name: str | None) -> Iterator[KeyEntry]:
        for info, rank, group in self._models(name):
            seen: set[bytes] = set()
            for block in blocks_of(self._store.client, info.id):
                salt = self._salts.get(block.block.key[-TAG_BYTES:])
                if salt is not None and block.key.prefix_hash not in seen:
                    seen.add(block.key.prefix_hash)
                    own = block.block.key[:-TAG_BYTES]
                    key = ObjectKey(own, info.layout.model, rank, group, salt)
                    yield KeyEntry(key.to_encoded_object_key(), block.block.payload_bytes)

    def get_usage(self) -> AdapterUsage:
        """See L2AdapterInterface; bytes by salt are of this process, the others of all."""
        by_salt = super().get_usage().bytes_by_cache_salt
        used = capacity = 0
        with self._store.guarded("usage"):
            used = sum(info.device_bytes for info, _, _ in self._models(None))
            capacity = self._store.client.space().total_bytes
        return AdapterUsage(used, capacity, by_salt)

    def report_status(self) -> dict[str, Any]:
        """See L2AdapterInterface; healthy without a daemon too, since all is a miss then."""
        return {
            "is_healthy": True, "type": type(self).__name__, "socket": self._store.socket,
            "locked": len(self._held), **self._store.statistics(),
        }  # fmt: skip

    def close(self) -> None:
        """See L2AdapterInterface; waits for what is under way."""
        self._ask.shutdown()
        self._putting.shutdown()
        self._store.close()
        for event in self._events:
            event.close()


def _runs(places: Sequence[tuple[Held, int] | None]) -> Iterator[list[int]]:
    """Indices of *places* that follow each other in one match; a place of its own is None."""
    run: list[int] = []
    for index, place in enumerate(places):
        before = places[run[-1]] if run else None
        if (
            run
            and place is not None
            and before is not None
            and (place[0] is before[0] and place[1] == before[1] + 1)
        ):
            run.append(index)
        else:
            yield from [run] if run else []
            run = [index]
    yield from [run] if run else []
