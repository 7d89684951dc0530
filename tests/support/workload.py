"""What many processes put and read at once: models, sessions that share prefixes, and payloads.

A payload is a pure function of its block's full name, so that whoever reads it can tell every wrong
byte, without knowing who put it. Everything here is pure.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from twfs.layout import Arrangement, Group, GroupKind, Layout
from twfs.prefix import Names
from twfs.store import Model

Bytes = npt.NDArray[np.uint8]

LAYOUTS: Final[Mapping[str, Layout]] = {
    # 8 layers of 8 KiB: blocks of 64 KiB, read whole, straight into their destination, or in parts
    "small": Layout("small", (Group(8, 2, 64),), 16),
    # 16 layers of 64 KiB: blocks of 1 MiB
    "large": Layout("large", (Group(16, 8, 64),), 32),
    # Two shards, payloads of no round length, and a group of which a match needs two blocks
    "mixed": Layout(
        "mixed",
        (
            Group(3, arrangement=Arrangement.LAYER_OPAQUE, layer_bytes=20_001),
            Group(
                1, kind=GroupKind.WINDOW, arrangement=Arrangement.OPAQUE, window_tokens=32,
                layer_bytes=65_536,
            ),
        ),
        16,
        shards=2,
    ),
}  # fmt: skip
# Segments a session may have, branches at each, blocks in one at most: together several times what
# the warehouse of a stress run holds, so that eviction never stops, and yet most begin alike.
SHAPES: Final[Mapping[str, tuple[int, int, int]]] = {
    "small": (6, 3, 6), "large": (3, 4, 3), "mixed": (5, 3, 4),
}  # fmt: skip
BRANCH_ODDS: Final = (6, 3, 2, 1)  # the first branch is taken most, so that there are hits
MODEL_ODDS: Final[Mapping[str, int]] = {"small": 5, "large": 2, "mixed": 3}
WORDS: Final = np.random.default_rng(7).integers(0, 1 << 63, (1 << 20) // 8, np.uint64)


@dataclass(frozen=True, slots=True)
class Session:
    """A prompt: which branch it takes at the end of each segment."""

    model: str
    path: tuple[int, ...]

    def names(self, model: Model) -> Names:
        """The names of all its blocks in *model*'s epoch."""
        chain = model.chain()
        for depth in range(1, len(self.path) + 1):
            here = f"{self.model}{self.path[:depth]}".encode()
            number = xxhash.xxh3_64_intdigest(here)
            blocks = 1 + number % SHAPES[self.model][2]
            count = blocks * model.layout.block_tokens
            chain.extend((np.arange(count, dtype=np.uint32) + np.uint32(number >> 40)) % 50_000)
        return chain.names()


def random_session(rng: random.Random, model: str | None = None) -> Session:
    """Choose a session, of *model* if given."""
    name = model or rng.choices(list(MODEL_ODDS), list(MODEL_ODDS.values()))[0]
    depth, branches, _ = SHAPES[name]
    odds = BRANCH_ODDS[:branches]
    return Session(
        name, tuple(rng.choices(range(branches), odds, k=rng.randint(1, depth)))
    )  # fmt: skip


def payload_of(
    model: str, epoch: int, prefix_hash: bytes, *, group: int, shard: int, byte_count: int
) -> Bytes:
    """The bytes of one block; no eight of them are those of another block in the same place."""
    seed = xxhash.xxh3_64_intdigest(f"{model} {epoch} {group} {shard} ".encode() + prefix_hash)
    words = WORDS[: -(-byte_count // 8)] ^ np.uint64(seed)
    return words.view(np.uint8)[:byte_count]
