"""The payload checksums: xxh3 for bytes in host memory, lane sums for bytes on a GPU too.

Also the one way from "a tensor, an array or a buffer" to its bytes. Not for prefix hashes
(prefix.py). Pure functions, safe in any thread; the numpy and xxhash calls on much release
the GIL.
"""

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from twfs.errors import InvalidInput
from twfs.records import Checksums
from twfs.store import Buffer
from twfs.units import ALIGN, IO_BYTES_MAX, align_up

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

MASK_64: Final = (1 << 64) - 1
LOW_32: Final = (1 << 32) - 1
ROW_WORDS: Final = ALIGN // 8  # a row is 4 KiB: 512 words of two lanes each
ROW_LANES: Final = ALIGN // 4
HASHED_BYTES: Final = 512 << 10  # hashed twice in a row: the second time out of L2
COPIED_AT_ONCE: Final = 256 << 10  # bytes: some 30 us, an engine's layer of one of its blocks
RUN_ROWS: Final = 256  # 1 MiB: few calls; 256 KiB, which L2 holds with its halves, is 1/5 slower
_COLUMN_WEIGHTS: Final = 2 * np.arange(ROW_WORDS, dtype=np.uint64) + np.uint64(1)


def loaded_torch() -> Any:
    """Return the torch module if this process has imported it, else None.

    Without it no buffer can be a tensor, so twfs itself never has to import it.
    """
    return sys.modules.get("torch")


def on_device(data: Buffer) -> bool:
    """Tell whether *data* is a torch tensor outside host memory."""
    torch = loaded_torch()
    return torch is not None and isinstance(data, torch.Tensor) and data.device.type != "cpu"


def flat_tensor(data: Any) -> Any:
    """Return the torch tensor *data* as a flat uint8 tensor over the same memory.

    InvalidInput if it is not contiguous.
    """
    if not data.is_contiguous():
        raise InvalidInput(f"a tensor of strides {tuple(data.stride())} is not contiguous")
    flat = (data.detach() if data.requires_grad else data).view(-1)
    return flat.view(loaded_torch().uint8)


def flat_bytes(data: Buffer, *, writable: bool = False) -> Bytes:
    """Return host memory as a flat uint8 array without copying it.

    InvalidInput if *data* is no buffer, is on a GPU, is not contiguous, or is read-only where
    *writable* is asked for.
    """
    torch = loaded_torch()
    if torch is not None and isinstance(data, torch.Tensor):
        if data.device.type != "cpu":
            raise InvalidInput(f"a tensor on {data.device} has no bytes in host memory")
        flat: Bytes = flat_tensor(data).numpy()
        return flat
    try:
        array = data if isinstance(data, np.ndarray) else np.asarray(memoryview(data))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{type(data).__name__} is no buffer: {error}") from error
    if array.dtype.hasobject or not array.flags.c_contiguous:
        raise InvalidInput(f"an array of strides {array.strides} and {array.dtype} is no buffer")
    if writable and not array.flags.writeable:
        raise InvalidInput("a read-only buffer cannot be a destination")
    return array.reshape(-1).view(np.uint8)


def copy_bytes(into: Bytes, source: Bytes) -> None:
    """Copy *source* to *into*, flat arrays of one length.

    A short copy keeps the GIL: beside a busy thread it takes up to 5 ms to get it back. A long one
    lets go of it, so that several threads copy at once.
    """
    if into.size <= COPIED_AT_ONCE:
        into.data[:] = source.data
    else:
        np.copyto(into, source)


def address_of(array: Bytes) -> int:
    """Return where the first byte of *array* is."""
    address: int = array.__array_interface__["data"][0]
    return address


def xxh3_of(data: Buffer) -> bytes:
    """Return the xxh3-128 of *data* in host memory, 16 bytes."""
    digest: bytes = xxhash.xxh3_128_digest(flat_bytes(data).data)
    return digest


def layer_sums_of(payload: Buffer, layers: int) -> tuple[int, ...]:
    """Return the xxh3-64 of each of *layers* equal runs of *payload*; () for 0 layers.

    InvalidInput if the length is no multiple of *layers*.
    """
    if not layers:
        return ()
    data = flat_bytes(payload)
    if data.size % layers:
        raise InvalidInput(f"{data.size} bytes cannot be cut into {layers} layers of equal length")
    step = data.size // layers
    return tuple(
        xxhash.xxh3_64_intdigest(data[i * step : (i + 1) * step].data) for i in range(layers)
    )


def host_sums_of(payload: Buffer, layers: int) -> tuple[bytes, tuple[int, ...]]:
    """Return xxh3_of and layer_sums_of *payload*, reading each layer from memory only once."""
    data = flat_bytes(payload)
    if not layers or data.size % layers:
        return xxh3_of(data), layer_sums_of(data, layers)
    step = data.size // layers
    whole, sums = xxhash.xxh3_128(), []
    for begin in range(0, data.size, step):
        layer = xxhash.xxh3_64()
        for at in range(begin, begin + step, HASHED_BYTES):
            run = data[at : min(at + HASHED_BYTES, begin + step)].data
            whole.update(run)
            layer.update(run)
        sums.append(layer.intdigest())
    return whole.digest(), tuple(sums)


def checksums_of(data: Buffer) -> Checksums:
    """Return both checksums of *data* in host memory."""
    return Checksums(xxh3_of(data), *lanes_of(data))


def lanes_of(data: Buffer) -> tuple[int, int]:
    """Return the plain and the weighted lane sum of *data*, both modulo 2**64.

    Lanes are 32 bits, little-endian, zero-extended, the last one padded with zero bytes; weights
    count from 1. Runs where the bytes are: on a GPU only the two numbers come to the host.
    """
    if on_device(data):
        return lanes_on_device(flat_tensor(data))
    flat = flat_bytes(data)
    whole = flat.size // ALIGN * ALIGN
    if flat.size % ALIGN and flat.size <= RUN_ROWS * ALIGN:
        whole = 0  # to copy the little there is costs less than to sum twice
    plain, weighted = _sum_rows(flat[:whole].view("<u8").reshape(-1, ROW_WORDS), 0)
    if whole < flat.size:
        tail = np.zeros(align_up(flat.size - whole), np.uint8)  # zero lanes add nothing
        tail[: flat.size - whole] = flat[whole:]
        last = _sum_rows(tail.view("<u8").reshape(-1, ROW_WORDS), whole // ALIGN)
        plain, weighted = plain + last[0], weighted + last[1]
    return plain & MASK_64, weighted & MASK_64


def _sum_rows(words: Words, first_row: int) -> tuple[int, int]:
    """Return both sums of 4 KiB rows, the first of which is row *first_row* of its payload.

    A word w holds lane 2k in its lower half and lane 2k+1 in its upper half u, so its lanes add
    up to w - (2**32 - 1) u, and weigh (2k+1) times that, plus u. Both are linear, and the weight
    of word k = 512 row + column splits into a row's and a column's part: so sums over rows and
    over columns of w and of u are enough, and those are plain 64-bit additions, which numpy does
    with vector instructions (multiplying every lane by its weight is five times slower).
    """
    rows = len(words)
    if not rows:
        return 0, 0
    row_sums = np.empty((2, rows), np.uint64)  # of the words, of their upper halves
    column_sums = np.zeros((2, ROW_WORDS), np.uint64)
    upper = np.empty((min(rows, RUN_ROWS), ROW_WORDS), np.uint64)
    for start in range(0, rows, RUN_ROWS):
        run = words[start : start + RUN_ROWS]
        halves = np.right_shift(run, np.uint64(32), out=upper[: len(run)])
        for part, of in enumerate((run, halves)):
            np.add.reduce(of, axis=1, out=row_sums[part, start : start + len(run)])
            column_sums[part] += np.add.reduce(of, axis=0)
    row_weights = np.arange(first_row, first_row + rows, dtype=np.uint64) * np.uint64(ROW_LANES)
    totals = column_sums.sum(axis=1, dtype=np.uint64)
    weighted = (row_sums * row_weights).sum(axis=1, dtype=np.uint64)
    weighted += (column_sums * _COLUMN_WEIGHTS).sum(axis=1, dtype=np.uint64)
    words_total, upper_total = int(totals[0]), int(totals[1])
    return (
        words_total - LOW_32 * upper_total,
        int(weighted[0]) - LOW_32 * int(weighted[1]) + upper_total,
    )


def lanes_on_device(flat: Any) -> tuple[int, int]:
    """Return both lane sums of a flat uint8 tensor, computed on its device with one wait."""
    plain, weighted = lanes_tensor(flat).tolist()
    return plain & MASK_64, weighted & MASK_64


def lanes_tensor(flat: Any) -> Any:
    """Return both lane sums of a flat uint8 tensor as 2 x int64 there, without waiting for it."""
    torch = loaded_torch()
    byte_count = flat.numel()
    if not byte_count or byte_count % ALIGN or flat.data_ptr() % 8:
        padded = torch.zeros(
            align_up(max(byte_count, 1)), dtype=torch.uint8, device=flat.device
        )  # zero lanes add nothing
        padded[:byte_count] = flat
        flat = padded
    plain, weighted = row_lanes_on_device(flat)
    numbers = torch.arange(len(plain), dtype=torch.int64, device=flat.device)
    return torch.stack((plain.sum(), (weighted + plain * (numbers * ROW_LANES)).sum()))


def row_lanes_on_device(flat: Any) -> Any:
    """Return the plain and weighted lane sums of each 4 KiB row, as a 2 x rows int64 tensor.

    *flat* is a uint8 tensor of whole rows, 8-byte aligned. Weights count from 1 within each row.
    Does not wait for the device; works in runs of 16 MiB, which bounds the temporary memory.
    """
    torch = loaded_torch()
    words = flat.view(torch.int64).view(-1, ROW_WORDS)
    lower_weights = torch.arange(
        1, ROW_LANES + 1, 2, dtype=torch.int64, device=flat.device
    )  # of the lower halves: 1, 3, 5 ...; an upper half weighs one more
    parts = []
    for run in words.split(IO_BYTES_MAX // ALIGN):
        upper = (run >> 32) & LOW_32  # the shift copies the sign; the mask takes it off
        both = (run & LOW_32) + upper
        weighted = (both * lower_weights).sum(1) + upper.sum(1)
        parts.append(torch.stack((both.sum(1), weighted)))
    return torch.cat(parts, dim=1)


def lanes_of_rows(rows: Words, first: Words, count: Words) -> tuple[Words, Words]:
    """Return the lane sums of many payloads from the 2 x n sums of the 4 KiB rows they lie in.

    Payload i has *count[i]* rows from *first[i]* on.
    """
    numbers = np.arange(rows.shape[1], dtype=np.uint64) * np.uint64(ROW_LANES)
    sums = np.zeros((2, rows.shape[1] + 1), np.uint64)
    np.cumsum(rows[0], out=sums[0, 1:])
    np.cumsum(rows[1] + rows[0] * numbers, out=sums[1, 1:])
    plain, weighted = sums[:, first + count] - sums[:, first]
    return plain, weighted - plain * first * np.uint64(ROW_LANES)
