"""The blocks of a stream as a warehouse knows them: names, layouts, payloads made of numbers."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from twfs.layout import Arrangement, Group, Layout
from twfs.prefix import Chain, Names, Root
from twfs.store import Model, Pieces
from twfs.units import Digest, PrefixHash
from twfs_tools.replay.streams import NO_PARENT, IntArray, Stream

TOKEN_MASK: Final = 0xFFFFFFFF
OWN_BYTES: Final = 64 << 10  # of a payload, unlike those of all others


def layout_for(name: str, payload_bytes: int, block_tokens: int) -> Layout:
    """A layout of which a block has *payload_bytes*; only its length is like the modelled one."""
    group = Group(
        layers=1, arrangement=Arrangement.OPAQUE, layer_bytes=payload_bytes, dtype="uint8"
    )
    return Layout(f"replay/{name}", (group,), block_tokens)


class Payloads:
    """The bytes of every block: its number over and over in its own part, then what all share.

    So a prompt of blocks of any size costs no more memory than one of them.
    """

    def __init__(self, payload_bytes: int) -> None:
        self._own = min(payload_bytes, OWN_BYTES) // 8
        rest = payload_bytes // 8 - self._own
        self._shared = np.random.default_rng(0).integers(0, 1 << 63, rest, np.uint64)

    def of(self, block: int) -> Pieces:
        """The payload of *block*, in pieces."""
        own = np.full(self._own, block, np.uint64).view(np.uint8)
        return [own, self._shared.view(np.uint8)] if len(self._shared) else own

    def is_of(self, block: int, payload: npt.NDArray[np.uint8]) -> bool:
        """Tell whether *payload* is that of *block*, byte by byte."""
        numbers = payload.view(np.uint64)
        own, rest = numbers[: self._own], numbers[self._own :]
        return bool((own == block).all()) and np.array_equal(rest, self._shared)


@dataclass(frozen=True)
class Naming:
    """Hashes and digests of all blocks of a stream, by number."""

    hashes: npt.NDArray[np.uint8]  # (b, 16)
    digests: npt.NDArray[np.uint8]  # (b, 32)
    roots: dict[tuple[int, int], PrefixHash]  # (tenant, model) -> its root's prefix hash
    stream: Stream

    @classmethod
    def of(cls, stream: Stream, models: "dict[tuple[int, int], Model]") -> "Naming":
        """Name the blocks as chains of token ids below the roots of *models*, (tenant, model)."""
        count = stream.unique_blocks
        hashes: list[PrefixHash] = [PrefixHash(b"")] * count
        digests: list[Digest] = [Digest(b"")] * count
        tokens = np.zeros(stream.block_tokens, np.uint32)
        owners = zip(stream.block_tenant.tolist(), stream.block_model.tolist(), strict=True)
        for block, (parent, owner) in enumerate(zip(stream.parent.tolist(), owners, strict=True)):
            root = (
                models[owner].root()
                if parent == NO_PARENT
                else Root(hashes[parent], digests[parent])
            )
            tokens[0], tokens[-1] = block & TOKEN_MASK, block >> 32
            names = Chain(root, stream.block_tokens).extend(tokens).names()
            hashes[block], digests[block] = names.hash_at(0), Digest(names.digests)
        roots = {owner: model.root().prefix_hash for owner, model in models.items()}
        return cls(
            np.frombuffer(b"".join(hashes), np.uint8).reshape(count, 16),
            np.frombuffer(b"".join(digests), np.uint8).reshape(count, 32),
            roots, stream,
        )  # fmt: skip

    def names(self, chain: IntArray, owner: tuple[int, int]) -> Names:
        """The names of one chain, all of it, of the (tenant, model) *owner*."""
        step, count = self.stream.block_tokens, len(chain)
        hashes = self.hashes[chain].tobytes()
        return Names(
            hashes, self.digests[chain].tobytes(), (self.roots[owner] + hashes)[: 16 * count],
            tuple(range(step, (count + 1) * step, step)),
        )  # fmt: skip
