"""Hostile bytes and hostile values, made from valid ones.

Random bytes die at the first length or checksum. So what is mutated is mostly whole: one field of a
message gets another value of its own or another kind, one word of a record an extreme. The same
functions serve Hypothesis, which draws the seed, and the coverage-guided fuzzer, which calls them
as its own mutator. The same seed gives the same input.
"""

import json
import random
from collections.abc import Callable
from typing import Any, Final

import msgspec

BYTES_MAX: Final = 1 << 16  # of one input; lengths inside it may claim anything
EXTREMES: Final = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 1 << 20,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 52) - 1, (1 << 63) - 4096, (1 << 63) - 1,
    1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip
TEXTS: Final = (
    "", ".", "..", "/", "a/b", "\0", "\n", "a\n", " ", "x" * 300,
    "\u0663\u0664", "\ud7ff", "\U0010ffff",
    "0" * 32, "0" * 32 + "\n", "f" * 31 + "g", "detached", ".twfs", "chain.json", "00000.kv",
    "00000.kv\n", "00000.g999.s9999.kv", "999999999.kv", "1e999", "-1", "NaN", "9" * 5000, "pinned",
    "bytes", "layer,bytes", "float4_e2m1fn_x2", "state", "window", "full",
)  # fmt: skip


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Return *data* with one to four changes: flips, extreme words, cuts, repeats, insertions."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        how = chance.randrange(6)
        if how == 0 and changed:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif how == 1:
            width = chance.choice((1, 2, 4, 8))
            word = chance.choice(EXTREMES) & ((1 << 8 * width) - 1)
            start = at - at % width if chance.random() < 0.7 else at
            changed[start : start + width] = word.to_bytes(width, chance.choice(("little", "big")))
        elif how == 2:
            del changed[at : at + chance.randrange(1, 64)]
        elif how == 3:
            changed[at:at] = changed[at : at + chance.randrange(1, 64)]
        elif how == 4:
            changed[at:at] = chance.randbytes(chance.randrange(1, 16))
        elif changed:
            del changed[chance.randrange(len(changed)) :]
    return bytes(changed[:BYTES_MAX])


def mutated_text(chance: random.Random, data: bytes) -> bytes:
    """Return a name, number or option near *data*."""
    text = data.decode("utf-8", "surrogateescape")
    other = chance.choice(TEXTS)
    near = (
        text + "\n", "\n" + text, text + other, other + text, text.upper(), text[:-1], text[1:],
        text * 2, text.replace("0", "\u0660"), other, text + ".0", text + "\0", text.swapcase(),
        text.replace("s", "\u017f"),
    )  # fmt: skip
    if chance.random() < 0.5:
        return mutated_bytes(chance, data)
    return chance.choice(near).encode("utf-8", "surrogateescape")[:BYTES_MAX]


def odd_value(chance: random.Random) -> Any:
    """Return a value of any kind that JSON or msgpack could bring."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: chance.choice(EXTREMES),
        lambda: -chance.choice(EXTREMES[:-3]),
        lambda: chance.choice(TEXTS),
        lambda: chance.choice((None, True, False)),
        lambda: chance.choice((0.5, 16.0, -1.5, 1e308, float("inf"), float("nan"))),
        lambda: [odd_value(chance) for _ in range(chance.randrange(3))],
        lambda: {chance.choice(TEXTS): odd_value(chance) for _ in range(chance.randrange(3))},
        lambda: nested(chance.choice((5, 200, 5000))),
        lambda: chance.randbytes(chance.choice((0, 1, 15, 16, 17, 23, 32, 64, 65))),
    )
    return chance.choice(kinds)()


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    deep: Any = 0
    for _ in range(depth):
        deep = [deep]
    return deep


def mutated_value(chance: random.Random, value: Any) -> Any:
    """Return *value* with one place in its tree changed, dropped, doubled or made odd."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value, key=str))
        changed = dict(value)
        how = chance.random()
        if how < 0.08:
            del changed[name]
        elif how < 0.12:
            changed[chance.choice(TEXTS)] = odd_value(chance)
        else:
            changed[name] = mutated_value(chance, value[name])
        return changed
    if isinstance(value, list | tuple) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        parts = list(value)
        how = chance.random()
        if how < 0.08:
            del parts[at]
        elif how < 0.16:
            parts[at:at] = parts[at : at + 1] * chance.choice((1, 2, 40))
        else:
            parts[at] = mutated_value(chance, parts[at])
        return parts
    if chance.random() < 0.3:
        return odd_value(chance)
    return _near(chance, value)


def _near(chance: random.Random, value: Any) -> Any:
    """Return a value of the same kind."""
    if isinstance(value, bool) or value is None:
        return chance.choice((True, False, None, 1))
    if isinstance(value, int):
        near = (value - 1, value + 1, value * 2, ~value & 0xFFFFFFFF, -value)
        return chance.choice((*near, *EXTREMES))
    if isinstance(value, bytes):
        return mutated_bytes(chance, value)
    if isinstance(value, str):
        spoilt = mutated_bytes(chance, value.encode()).decode(errors="replace")
        return chance.choice((spoilt, value + "\n", value.upper(), *TEXTS))
    return odd_value(chance)


def mutated_packed(chance: random.Random, data: bytes) -> bytes:
    """As mutated_value, for a msgpack message; of its bytes where it is none."""
    return _mutated_document(
        chance, data, msgspec.msgpack.decode, msgspec.msgpack.Encoder(enc_hook=str).encode
    )


def mutated_json(chance: random.Random, data: bytes) -> bytes:
    """As mutated_value, for a JSON document; of its bytes where it is none."""
    if chance.random() < 0.02 and b"{" in data:  # deeper than json itself would write
        at = data.index(b"{") + 1
        return data[:at] + b'"deep":' + b"[" * chance.choice((500, 20_000)) + data[at:]
    return _mutated_document(
        chance, data, json.loads, lambda value: json.dumps(value, default=repr).encode()
    )


def _mutated_document(
    chance: random.Random, data: bytes, decode: Callable[[bytes], Any],
    encode: Callable[[Any], bytes],
) -> bytes:  # fmt: skip
    if chance.random() < 0.15:
        return mutated_bytes(chance, data)
    try:
        value = decode(data)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            value = mutated_value(chance, value)
        return encode(value)[:BYTES_MAX]
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return mutated_bytes(chance, data)
