"""An L2 adapter plugin for LMCache's multiprocess mode (0.5): its L2 is then a twfs warehouse.

LMCache names blocks by hash, salt and rank and says nothing of their order; what one lookup asks
for in a row is taken for a chain, which is what `ls` shows and eviction respects. How to configure
it: docs/lmcache.md.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby, islice
from typing import Any, Final
from uuid import uuid4

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.platform import create_event_notifier

from twfs.engines.keyed import PATIENCE_S, READ_TIMEOUT_S, STORED, KeyedStore, Revisions, Space
from twfs.errors import InvalidInput, TwfsError
from twfs.layout import Arrangement, Group, Layout
from twfs.store import ModelInfo, PutOutcome

log = init_logger(__name__)  # LMCache's, or its server would show warnings alone

ENGINE: Final = "lmcache"
PARAMS: Final = frozenset({"socket", "revisions", "tenants", "timeout_s", "patience_s"})
THREADS: Final = 4  # of lookups and loads; puts have two of their own
TOUCHES_MAX: Final = 64  # requests whose use is still to be told; more are left out
LISTINGS_MAX: Final = 16  # under way at once; older ones begin anew
BLOCK_TOKENS: Final = 256  # LMCache's --chunk-size where its shapes do not tell

Row = tuple[str, int, int, str]  # model, rank, group, salt: blocks of one chain
Shapes = tuple[tuple[Any, ...], tuple[Any, ...]]  # torch.Size and torch.dtype of its tensors


def row_of(key: ObjectKey) -> Row:
    """What *key* has in common with the keys of its chain."""
    return key.model_name, key.kv_rank, key.object_group_id, key.cache_salt


def shapes_of(memory: Any) -> Shapes:
    """Of the tensors that lie one behind the other in a MemoryObj."""
    meta = memory.meta
    if meta.shapes is not None and meta.dtypes is not None:
        return tuple(meta.shapes), tuple(meta.dtypes)
    return (meta.shape,), (meta.dtype,)


def layout_of(row: Row, shapes: Shapes, revision: str) -> Layout:
    """The layout of the blocks of *row*: all that LMCache tells of them is in its fingerprint."""
    sizes, dtypes = shapes
    texts = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    block_bytes = sum(
        size.numel() * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True)
    )
    tokens = int(sizes[0][-2]) if len(sizes[0]) > 2 else BLOCK_TOKENS
    return Layout(
        row[0], (Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=block_bytes),), tokens,
        revision=revision, engine=ENGINE,
        overrides={
            "rank": f"{row[1]:#x}", "group": str(row[2]), "dtypes": ";".join(texts),
            "shapes": ";".join("x".join(map(str, size)) for size in sizes),
        },
    )  # fmt: skip


class TwfsL2Adapter(L2AdapterInterface):
    """See the module's docstring.

    *params*: `socket` of the daemon; `revisions`, by a model's name the directory of its weights,
    or what else tells them; `tenants`, by a salt whose blocks its blocks are; `timeout_s` of loads,
    and `patience_s` for answers.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()  # of no capacity: the daemon evicts, and not LMCache's own watermark
        del l1_memory_desc  # loads are verified before they enter it
        if unknown := set(params) - PARAMS:
            raise InvalidInput(f"adapter_params has {sorted(unknown)}: twfs knows {sorted(PARAMS)}")
        patience_s = float(params.get("patience_s", PATIENCE_S))
        self._store = KeyedStore(ENGINE, params["socket"], patience_s=patience_s)
        self._revisions = Revisions(params.get("revisions", {}))
        self._tenants: dict[str, str] = params.get("tenants", {})
        self._timeout_s: float | None = params.get("timeout_s", READ_TIMEOUT_S)
        self._events = [create_event_notifier() for _ in range(3)]  # store, lookup, load
        self._guard = threading.Lock()
        self._tasks = 0
        self._done: dict[int, Any] = {}  # bitmaps of lookups and loads
        self._stored: dict[int, L2StoreResult] = {}
        self._sizes: dict[ObjectKey, int] = {}  # that LMCache was told are stored
        self._shapes: dict[Row, Shapes] = {}  # last seen; not every lookup brings them
        self._spaces: dict[tuple[Row, Shapes, str], Space] = {}  # by revision
        self._listings: dict[str, Iterator[KeyEntry]] = {}
        self._asking = ThreadPoolExecutor(THREADS, "twfs-lmcache")
        self._putting = ThreadPoolExecutor(2, "twfs-lmcache-put")
        self._touching = ThreadPoolExecutor(1, "twfs-lmcache-touch")
        self._touches_left = threading.BoundedSemaphore(TOUCHES_MAX)
        if self._event_bus.enabled:
            self._event_bus.subscribe(EventType.L1_KEYS_ACCESSED, self._on_accessed)
        for model in params.get("revisions", {}):  # before any engine has computed with it
            told = partial(self._revisions.of, model)
            self._asking.submit(self._store.quietly, "weights are not told", told, "")
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

    def _submit(self, event: int, work: Callable[[], Any], failed: Any) -> int:
        """Have *work* done, keep what it returns (or *failed*) for its task, and raise *event*."""
        with self._guard:
            self._tasks += 1
            task = self._tasks

        def run() -> None:
            result = self._store.quietly("a task failed", work, failed)
            with self._guard:
                (self._done if event else self._stored)[task] = result
            self._events[event].notify()

        (self._asking if event else self._putting).submit(run)
        return task

    def _space(self, row: Row, shapes: Shapes, *, again: bool = False) -> Space:
        """Where the blocks of *row* are. InvalidInput.

        *again*: for what a lookup has found, whose weights are not looked at once more.
        """
        self._shapes[row] = shapes
        revision = self._revisions.last(row[0]) if again else self._revisions.of(row[0])
        space = self._spaces.get((row, shapes, revision))
        if space is None:
            layout = layout_of(row, shapes, revision)
            space = self._store.space(layout, self._tenants.get(row[3]), row[3])
            self._spaces[row, shapes, revision] = space
        return space

    # Store, lookup, load

    def submit_store_task(self, keys: list[ObjectKey], memory: list[Any]) -> int:
        """See L2AdapterInterface; *memory* are its MemoryObj, one a key."""
        failed = L2StoreResult(success=False, bytes_transferred=0)
        return self._submit(0, partial(self._do_store, keys, memory), failed)

    def _do_store(self, keys: list[ObjectKey], memory: list[Any]) -> L2StoreResult:
        good, written, fresh = True, 0, dict[ObjectKey, int]()
        for row, part in groupby(zip(keys, memory, strict=True), lambda pair: row_of(pair[0])):
            some, blocks = zip(*part, strict=True)
            space = self._space(row, shapes_of(blocks[0]))
            hashes = [key.chunk_hash for key in some]
            self._store.places.follow(hashes, space.layout.block_tokens)
            outcomes = space.put(hashes, [block.byte_array for block in blocks])
            for key, block, outcome in zip(some, blocks, outcomes, strict=True):
                if outcome in STORED and key not in self._sizes:
                    fresh[key] = block.get_size()
                written += block.get_size() if outcome is PutOutcome.PUBLISHED else 0
            good = good and STORED.issuperset(outcomes)
        if fresh:
            self._sizes |= fresh
            self._notify_keys_stored(list(fresh), list(fresh.values()))
        return L2StoreResult(good, written)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """See L2AdapterInterface."""
        with self._guard:
            done = dict(self._stored)
            self._stored.clear()
        return done

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """See L2AdapterInterface; keys of one model, rank, group and salt are a chain."""
        work = partial(self._do_lookup, keys, group_layout_descs)
        return self._submit(1, work, Bitmap(len(keys)))

    def _do_lookup(self, keys: list[ObjectKey], descs: dict[int, Any]) -> Any:
        bitmap = Bitmap(len(keys))
        for row, part in groupby(range(len(keys)), lambda index: row_of(keys[index])):
            some, desc, shapes = list(part), descs.get(row[2]), self._shapes.get(row)
            if desc is not None:
                shapes = tuple(desc.shapes), tuple(desc.dtypes)
            if shapes is None:
                continue  # nothing of it was ever stored by this process
            space = self._space(row, shapes)
            hashes = [keys[index].chunk_hash for index in some]
            self._store.places.learn(hashes, space.layout.block_tokens)
            found = {some[place] for place in space.lock(hashes)}
            for index in found:
                bitmap.set(index)
            lost = [keys[index] for index in some if index not in found]
            if any(key in self._sizes for key in lost) and space.held(hashes) >= 0:
                self._notify_gone(lost)
        return bitmap

    def submit_load_task(self, keys: list[ObjectKey], memory: list[Any]) -> int:
        """See L2AdapterInterface; *memory* are its MemoryObj, one a key."""
        return self._submit(2, partial(self._do_load, keys, memory), Bitmap(len(keys)))

    def _do_load(self, keys: list[ObjectKey], memory: list[Any]) -> Any:
        bitmap = Bitmap(len(keys))
        for row, part in groupby(range(len(keys)), lambda index: row_of(keys[index])):
            some = list(part)
            # By the memory's own shapes: KV of others is elsewhere.
            space = self._space(row, shapes_of(memory[some[0]]), again=True)
            into = [memory[index].byte_array for index in some]
            hashes = [keys[index].chunk_hash for index in some]
            for place in space.read(hashes, into, self._timeout_s):
                bitmap.set(some[place])
        self._notify_keys_accessed(bitmap.gather(keys))
        return bitmap

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """See L2AdapterInterface."""
        with self._guard:
            return self._done.pop(task_id, None)

    def query_load_result(self, task_id: int) -> Any:
        """See L2AdapterInterface."""
        return self.query_lookup_and_lock_result(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """See L2AdapterInterface."""
        self._asking.submit(self._store.quietly, "unlock", partial(self._do_unlock, keys), None)

    def _do_unlock(self, keys: list[ObjectKey]) -> None:
        for row, part in groupby(keys, row_of):
            if row in self._shapes:
                space = self._space(row, self._shapes[row], again=True)
                space.unlock([key.chunk_hash for key in part])

    def _on_accessed(self, event: Any) -> None:
        """A request has ended, whose whole chain *event* names, or was served from L1's memory.

        On LMCache's thread of events, which waits for nothing here.
        """
        if not self._touches_left.acquire(blocking=False):
            self._store.count("touches left out")
            return
        work = partial(self._do_touch, list(event.metadata["keys"]))
        with suppress(RuntimeError):  # closed, while events still come
            self._touching.submit(self._store.quietly, "a touch failed", work, None)

    def _do_touch(self, keys: list[ObjectKey]) -> None:
        """Count a use of *keys*, in order within each row, wherever they were served from."""
        self._touches_left.release()
        rows = defaultdict[Row, list[bytes]](list)
        for key in keys:
            rows[row_of(key)].append(key.chunk_hash)
        for row, hashes in rows.items():
            if row in self._shapes:
                self._space(row, self._shapes[row], again=True).touch(hashes)
        self._store.count("touches")

    def _notify_gone(self, keys: Sequence[ObjectKey]) -> None:
        """Tell LMCache of blocks that are not there any more, of those that it was told of."""
        gone = {key: self._sizes.pop(key) for key in keys if key in self._sizes}
        if gone:
            self._notify_keys_deleted(list(gone), list(gone.values()))

    # What an operator asks through LMCache

    def _models(self, name: str | None) -> Iterator[tuple[ModelInfo, int, int]]:
        """Our models of LMCache's model *name* (None: of all), with their rank and group."""
        for info in self._store.models():
            if name in {None, info.layout.model}:
                overrides = info.layout.overrides
                yield info, int(overrides["rank"], 16), int(overrides["group"])

    def delete(self, keys: list[ObjectKey]) -> None:
        """See L2AdapterInterface; what goes on from a block goes with it, for nothing finds it.

        Never raises, for LMCache's thread of eviction would end: it is told of what is gone.
        """
        for row, part in groupby(keys, row_of):
            some = list(part)
            work = partial(self._delete, row, some)
            if self._store.quietly("a removal failed", work, default=False):
                self._notify_gone(some)

    def _delete(self, row: Row, keys: list[ObjectKey]) -> bool:
        """Remove *keys* of *row* from all of its models; False if one of them was not reached."""
        hashes = [key.chunk_hash for key in keys]
        reached = True
        for info, rank, group in self._models(row[0]):
            if (rank, group) == row[1:3]:
                space = self._store.space(info.layout, self._tenants.get(row[3]), row[3])
                reached = space.remove(hashes) and reached
        return reached

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """See L2AdapterInterface; blocks of a salt that was not seen since the start are left out.

        A cursor is good once, and until this process ends: ValueError. NotImplementedError without
        a daemon, which LMCache answers with 503: an empty page would say that nothing is there.
        """
        listing = self._list(model_name) if cursor is None else self._listings.pop(cursor, None)
        if listing is None or page_size <= 0:
            raise ValueError("no such cursor, or no positive size: list from the beginning")
        try:
            found, token = tuple(islice(listing, page_size)), None
        except (TwfsError, OSError) as error:
            raise NotImplementedError(f"not now: {error}") from error
        if len(found) == page_size:
            token = uuid4().hex
            self._listings[token] = listing
            for old in list(self._listings)[:-LISTINGS_MAX]:
                del self._listings[old]
        return KeyListPage(found, token)

    def _list(self, name: str | None) -> Iterator[KeyEntry]:
        for info, rank, group in self._models(name):
            for own, salt, block in self._store.blocks(info):
                key = ObjectKey(own, info.layout.model, rank, group, salt)
                yield KeyEntry(key.to_encoded_object_key(), block.block.payload_bytes)

    def get_usage(self) -> AdapterUsage:
        """See L2AdapterInterface; bytes by salt are of this process, the others of all."""

        def work() -> tuple[int, int]:
            used = sum(info.device_bytes for info, _, _ in self._models(None))
            return used, self._store.client.space().total_bytes

        by_salt = super().get_usage().bytes_by_cache_salt
        return AdapterUsage(*self._store.quietly("usage is not known", work, (0, 0)), by_salt)

    def report_status(self) -> dict[str, Any]:
        """See L2AdapterInterface; healthy without a daemon too, since all is a miss then."""
        statistics = self._store.statistics()
        return {"is_healthy": True, "type": "TwfsL2Adapter", "socket": self._store.socket,
                "counters": statistics}  # fmt: skip

    def close(self) -> None:
        """See L2AdapterInterface; waits for what is under way."""
        self._asking.shutdown()
        self._putting.shutdown()
        self._touching.shutdown()
        self._store.close()
        for event in self._events:
            event.close()
