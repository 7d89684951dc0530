"""The scrubber: reads every block again in the background, and makes holes of what has gone bad.

One pass goes through the blocks in the order of their keys, which never change: so its position,
durable in the metadata, skips no block that was there when the pass began, whatever is put, moved
or removed meanwhile. A batch is read in the order of its places. What looks wrong counts only if a
second read says so too, the record is still the same, and the device works elsewhere.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from twfs.checking.pacing import Foreground, Pacer, Stopped, lower_io_priority
from twfs.checking.proving import header_fault
from twfs.checking.subject import Live
from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.devices.payload import aligned_buffer, header_complaint, read_whole, verified
from twfs.errors import BadPayload, DeviceError, InvalidInput, TwfsError
from twfs.eviction import evicting
from twfs.index import slots as states
from twfs.index.slots import KEY_BYTES
from twfs.records import Block, BlockKey, Extent, Header, Superblock
from twfs.units import ALIGN, ByteOffset

log = logging.getLogger("twfs.scrub")

META_NAME: Final = "scrub"
IO_BYTES: Final = 1 << 20  # of one read: what an engine's read may have to wait behind
BATCH_BLOCKS: Final = 512  # unpacking them takes about 5 ms, and sorting pays from hundreds on
BATCH_BYTES: Final = 256 << 20  # what is looked at again after a stop, at most
SCANNED_MAX: Final = 4096  # records in one transaction, where most are holes
SAVE_SECONDS: Final = 10.0  # between two commits of the position
THREADS: Final = 4  # reads in flight without a rate: what one drive needs to be busy
LOOKS: Final = 2  # a bad read is tried again before it counts: buses err too
WITNESSES: Final = 16  # blocks elsewhere on a device, of which one must read well
SAMPLE: Final = 2048  # slots drawn to find them: enough for each of 64 devices
FINDINGS_KEPT: Final = 100  # sentences about bad blocks; the counters count all
STOP_SECONDS: Final = 5.0  # a device that hangs must not keep an operator's verb
RATE_MAX: Final = 1 << 40

_Pair = tuple[BlockKey, Block]


class PassEnd(msgspec.Struct, frozen=True):
    """How a pass went that has come to its end."""

    number: int
    began_ms: int
    ended_ms: int
    blocks: int
    read_bytes: int
    bad_blocks: int
    skipped_blocks: int
    failing_devices: list[int]


class State(msgspec.Struct):
    """What the metadata keeps of the scrubber."""

    number: int = 0  # of the present pass, or of the last one
    running: bool = False  # it goes on by itself after a restart
    unfinished: bool = False
    position: str = ""  # hex of the last key looked at; "" is before the first
    began_ms: int = 0
    blocks: int = 0
    read_bytes: int = 0
    bad_blocks: int = 0
    skipped_blocks: int = 0  # unreadable records, and blocks of devices that fail
    failing_devices: list[int] = []
    rate_bytes_s: int | None = None
    last: PassEnd | None = None


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of "scrub-start"; rate 0 sets no limit, None gives way to others."""

    rate_bytes_s: int | None = None
    whole: bool = False  # a new pass, even where one is unfinished


@dataclass(frozen=True, slots=True)
class _Look:
    """What came of one block; *why* is empty unless it is bad."""

    pair: _Pair
    read: bool = True
    why: str = ""
    device: int = 0


def load_state(packed: bytes | None) -> State:
    """Return the state of the metadata, a fresh one if it is none of ours or makes no sense."""
    try:
        state = msgspec.json.decode(packed or b"{}", type=State)
        if len(bytes.fromhex(state.position)) not in {0, KEY_BYTES}:
            raise ValueError(state.position)
    except (msgspec.DecodeError, ValueError) as error:
        log.warning("the scrubber's state is unreadable, it begins anew: %s", error)
        return State()
    return state


def device_works(core: Core, index: int) -> bool:
    """Tell whether device *index* still reads well anywhere; the one place that decides this.

    A bad block becomes a hole only if this is so: what reads badly on a device that has failed
    as a whole, or has come back empty, is not lost yet. Some other block's header must be right;
    where hardly any other lies there, the superblocks must. Blocks on the device.
    """
    for tried, (key, block) in enumerate(_elsewhere(core, index), 1):
        if _header_is_good(core, key, block):
            return True
        if tried == WITNESSES:
            return False
    return _superblocks_are_good(core, index)


def _elsewhere(core: Core, index: int) -> Iterator[_Pair]:
    """Blocks that begin on device *index*, drawn by chance from all."""
    slots = core.slots
    with core.lock:
        live = np.flatnonzero((slots.state == states.LIVE) & ~slots.hole)
    chance = np.random.default_rng()
    drawn = live if len(live) <= SAMPLE else live[chance.integers(0, len(live), SAMPLE)]
    for slot in chance.permutation(drawn).tolist():
        with core.lock, core.metadata.read() as view:
            key = slots.key_of(slot)
            block = view.block(key) if slots.state[slot] == states.LIVE else None
        if block is not None and block.extents and block.extents[0].device == index:
            yield key, block


def _header_is_good(core: Core, key: BlockKey, block: Block) -> bool:
    buffer = aligned_buffer(ALIGN)
    first = block.extents[0]
    try:
        core.devices[first.device].read_into([buffer], first.offset)
        return header_complaint(Header.unpack(buffer), key, block) is None
    except (ValueError, KeyError, DeviceError):
        return False


def _superblocks_are_good(core: Core, index: int) -> bool:
    device = core.devices.get(index)
    if device is None:
        return False
    buffer = aligned_buffer(ALIGN)
    try:
        for offset in (0, device.size_bytes - ALIGN):
            device.read_into([buffer], ByteOffset(offset))
            if Superblock.unpack(bytes(buffer)).device != device.uuid:
                return False
    except (ValueError, DeviceError):
        return False
    return True


class Scrubber:
    """The scrubber of one open warehouse: at most one pass, in a thread of its own. Thread-safe."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._control = threading.Lock()  # one start or stop at a time
        self._saving = threading.Lock()  # the newest state is saved last
        self._lock = threading.Lock()  # guards what follows; nobody waits under it
        with core.metadata.read() as view:
            self._state = load_state(view.meta(META_NAME))
        self._failing: set[int] = set()  # in this run: a restart gives devices another chance
        self._findings: list[str] = []
        self._trouble = ""
        self._batch_bytes = 0  # read since the position was last moved
        self._thread: threading.Thread | None = None
        self._going = False  # the thread has not come to the end of its work
        self._end = threading.Event()
        self._stopping = False  # the end is an operator's wish, so nothing goes on after a restart
        self._run_began = 0.0
        self._run_bytes = 0
        self._pacer = Pacer(Foreground(core).busy, lambda: len(core.devices), self._end)

    # For the operator

    def verbs(self) -> Verbs:
        """scrub-start, scrub-stop and scrub-status; all return the status."""
        return {
            "scrub-start": Verb(Start, self._started),
            "scrub-stop": Verb(NoArguments, lambda _: self.stop()),
            "scrub-status": Verb(NoArguments, lambda _: self.status()),
        }

    def _started(self, given: Start) -> dict[str, Any]:
        return self.start(given.rate_bytes_s, whole=given.whole)

    def start(self, rate_bytes_s: int | None = None, *, whole: bool = False) -> dict[str, Any]:
        """Go on with the unfinished pass, or with *whole* or where there is none begin one.

        A pass that runs gets the rate. InvalidInput for a rate that cannot be; DeviceError if the
        last pass still waits for a device. Blocks on a commit; returns the status.
        """
        if rate_bytes_s is not None and not 0 <= rate_bytes_s <= RATE_MAX:
            raise InvalidInput(f"a rate of {rate_bytes_s} bytes/s: 0 (no limit) to {RATE_MAX}")
        with self._control:
            if whole or self._end.is_set():
                self._end_thread(stopping=True, timeout_s=STOP_SECONDS)
            with self._lock:
                if self._going and self._end.is_set():
                    raise DeviceError("the last pass still waits for a device: try again later")
                if whole or not self._state.unfinished:
                    self._begin_pass()
                self._state.rate_bytes_s = rate_bytes_s
                self._state.running = True
                running = self._going
            self._pacer.rate_bytes_s = rate_bytes_s
            if not running:
                self._launch()
            self._save()
        return self.status()

    def resume(self) -> None:
        """Go on with a pass that a restart has interrupted; for daemons, at their start."""
        with self._control:
            if self._state.running and not self._going:
                self._pacer.rate_bytes_s = self._state.rate_bytes_s
                self._launch()

    def stop(self) -> dict[str, Any]:
        """End the pass; the next start goes on with it. Waits at most 5 s; returns the status."""
        with self._control:
            self._end_thread(stopping=True, timeout_s=STOP_SECONDS)
            with self._lock:
                forgotten = self._state.running and not self._going
                self._state.running &= self._going
            if forgotten:  # a pass that was interrupted and not resumed here
                self._save()
        return self.status()

    def close(self) -> None:
        """End the thread; the pass goes on when the warehouse is opened by a daemon again."""
        with self._control:
            self._end_thread(stopping=False, timeout_s=None)

    def status(self) -> dict[str, Any]:
        """All there is to say, JSON-ready; names are stable."""
        core = self._core
        with core.lock:
            used = core.slots.units[core.slots.state == states.LIVE]
            total_bytes = int(used.sum(dtype=np.int64)) * ALIGN
        with self._lock:
            state, alive = self._state, self._going
            done = state.read_bytes + self._batch_bytes
            seconds = time.monotonic() - self._run_began
            rate = self._run_bytes / seconds if alive and seconds > 0 else 0.0
            left = max(0, total_bytes - done)
            return {
                "state": self._word(alive=alive),
                "pass": state.number,
                "began_ms": state.began_ms,
                "blocks": state.blocks,
                "read_bytes": done,
                "total_bytes": total_bytes if state.unfinished else done,
                "bad_blocks": state.bad_blocks,
                "skipped_blocks": state.skipped_blocks,
                "failing_devices": list(state.failing_devices),
                "findings": list(self._findings),
                "trouble": self._trouble,
                "rate_bytes_s": state.rate_bytes_s,
                "present_bytes_s": round(rate),
                "busy": alive and self._pacer.busy,
                "eta_seconds": round(left / rate) if alive and rate else None,
                "last": None if state.last is None else msgspec.structs.asdict(state.last),
            }

    def _word(self, *, alive: bool) -> str:
        """The state in one word."""
        if alive:
            return "stopping" if self._end.is_set() else "running"
        return "unfinished" if self._state.unfinished else "idle"

    def _begin_pass(self) -> None:
        """Set the state to the beginning of a new pass. Hold the lock."""
        self._state = State(
            number=self._state.number + 1, unfinished=True, began_ms=self._core.clock(),
            last=self._state.last,
        )  # fmt: skip
        self._findings.clear()

    def _launch(self) -> None:
        """Start the thread."""
        if self._thread is not None:
            self._thread.join()  # it may be saving yet
        with self._lock:
            self._end.clear()
            self._stopping, self._going = False, True
            self._failing.clear()
            self._trouble = ""
            self._run_began, self._run_bytes = time.monotonic(), 0
        self._thread = threading.Thread(target=self._run, name="twfs-scrub", daemon=True)
        self._thread.start()

    def _end_thread(self, *, stopping: bool, timeout_s: float | None) -> None:
        """Tell the thread to end, and wait for that."""
        if self._thread is not None:
            self._stopping = stopping
            self._end.set()
            self._thread.join(timeout_s)

    # The pass

    def _run(self) -> None:
        """The thread: one pass, or what is left of one."""
        lower_io_priority()
        try:
            try:
                self._go_through()
            except Stopped:
                with self._lock:
                    self._state.running = not self._stopping
                    self._going = False
            self._save()
        except TwfsError as error:  # the metadata takes no writes, say: what is durable stays true
            log.warning("the scrubber has ended: %s", error)
            with self._lock:
                self._trouble = str(error)
        finally:
            with self._lock:
                self._batch_bytes = 0
                self._going = False

    def _go_through(self) -> None:
        """Look at all blocks behind the position; Stopped."""
        saved = time.monotonic()
        position = bytes.fromhex(self._state.position)
        while True:
            batch, last, skipped = self._next_batch(position)
            if last == position:
                break
            blocks = read_bytes = 0
            for look in self._looks(batch):
                if look.read and (not look.why or self._judge(look)):
                    blocks += 1
                    read_bytes += look.pair[1].device_bytes
                else:
                    skipped += 1
                with self._lock:
                    self._batch_bytes = read_bytes
            position = last
            with self._lock:
                self._batch_bytes = 0
                self._state.position = position.hex()
                self._state.blocks += blocks
                self._state.read_bytes += read_bytes
                self._state.skipped_blocks += skipped
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        self._finish()

    def _next_batch(self, position: bytes) -> tuple[list[_Pair], bytes, int]:
        """Return blocks behind *position* by place, the last key seen, and unreadable records."""
        found: list[_Pair] = []
        last, bad, total_bytes = position, 0, 0
        with self._core.metadata.read() as view:
            for scanned, (raw_key, raw) in enumerate(view.blocks_after(position), 1):
                last = raw_key
                try:
                    key, block = BlockKey.unpack(raw_key), Block.unpack(raw)
                except ValueError:  # the checker's task: it knows what to do with the rest
                    bad += 1
                    continue
                if not block.hole:
                    found.append((key, block))
                    total_bytes += block.device_bytes
                if (
                    len(found) >= BATCH_BLOCKS
                    or total_bytes >= BATCH_BYTES
                    or scanned >= SCANNED_MAX
                ):
                    break
        found.sort(key=lambda pair: (pair[1].extents[0].device, pair[1].extents[0].offset))
        return found, last, bad

    def _looks(self, batch: list[_Pair]) -> Iterable[_Look]:
        """Look at all of *batch*; with a rate one after the other, without several at once."""
        if self._pacer.rate_bytes_s != 0:
            yield from map(self._look, batch)
            return
        with ThreadPoolExecutor(THREADS, "twfs-scrub-io") as pool:
            yield from pool.map(self._look, batch)

    def _look(self, pair: _Pair) -> _Look:
        """Read and prove one block; a bad read counts if it is bad again and still the same block.

        Stopped.
        """
        key, block = pair
        why, at = "", [int(block.extents[0].device)]
        for _ in range(LOOKS):
            if any(
                extent.device in self._failing or extent.device not in self._core.devices
                for extent in block.extents
            ):
                return _Look(pair, read=False)
            try:
                self._prove(key, block, at)
            except (BadPayload, DeviceError, ValueError, KeyError) as error:
                why = str(error)
            else:
                return _Look(pair)
            if not Live.of(self._core).unchanged(key, block):  # evicted, removed or moved: not lost
                return _Look(pair)
        return _Look(pair, why=why, device=at[0])

    def _prove(self, key: BlockKey, block: Block, at: list[int]) -> None:
        """Read one block and prove all of it; *at* gets the device that was read last."""
        core = self._core
        buffer = read_whole(
            core.devices, key, block, io_bytes=IO_BYTES, before_each=partial(self._pace, at)
        )
        at[0] = int(block.extents[0].device)  # whose the sums are cannot be told: the header's
        verified(buffer, key, block, lanes=True)
        model = core.models.get(key.model)
        fault = header_fault(Live.of(core), model, key, block, buffer[:ALIGN])
        if fault is not None:
            raise BadPayload(f"block {key.prefix_hash.hex()}: {fault}")

    def _pace(self, at: list[int], extent: Extent, byte_count: int) -> None:
        """Wait for the turn of one read."""
        at[0] = int(extent.device)
        self._pacer.take(byte_count)
        with self._lock:
            self._run_bytes += byte_count

    def _judge(self, look: _Look) -> bool:
        """Make a hole of a bad block; False if its device has failed and it is left as it is."""
        key, block = look.pair
        if look.device in self._failing:
            return False
        if not device_works(self._core, look.device):
            log.warning("device %d fails: it is scrubbed no more (%s)", look.device, look.why)
            with self._lock:
                self._failing.add(look.device)
                if look.device not in self._state.failing_devices:
                    self._state.failing_devices.append(look.device)
            return False
        if not Live.of(self._core).unchanged(key, block):
            return True
        if evicting.spoil(self._core, key, block.generation):
            log.warning("a hole was made: %s", look.why)
            with self._lock:
                self._state.bad_blocks += 1
                if len(self._findings) < FINDINGS_KEPT:
                    self._findings.append(look.why)
            self._save()
        return True

    def _finish(self) -> None:
        """Note that the pass has come to its end."""
        with self._lock:
            state = self._state
            state.running = state.unfinished = self._going = False
            state.position = ""
            state.last = PassEnd(
                state.number, state.began_ms, self._core.clock(), state.blocks, state.read_bytes,
                state.bad_blocks, state.skipped_blocks, state.failing_devices,
            )  # fmt: skip

    def _save(self) -> None:
        """Make the state durable; TwfsErrors."""
        with self._saving:
            with self._lock:
                packed = msgspec.json.encode(self._state)
            self._core.metadata.submit(lambda view: view.set_meta(META_NAME, packed)).result()
