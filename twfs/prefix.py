"""Token ids to names: the chain of prefix hashes and digests of a prompt.

xxh3 names, SHA-256 proves. A block's prefix hash names it and all before it; its digest runs over
the same chain and is compared on every match, so that a collision of names is a miss and never
somebody else's KV. The salt and the epoch enter at the root.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import xxhash

from twfs.errors import InvalidInput
from twfs.units import (
    DIGEST_BYTES,
    HASH_BYTES,
    KEY_BYTES_MAX,
    Digest,
    PrefixHash,
    TokenCount,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

POSITION_MAX: Final = (1 << 32) - 1  # a u32 in record and header
TOKEN_RANGE = "token ids must be integers from 0 to 4294967295"


@dataclass(frozen=True, slots=True)
class Root:
    """Where the chains of one model, epoch and salt begin."""

    prefix_hash: PrefixHash
    digest: Digest


def root_of(fingerprint: bytes, epoch: int, salt: bytes = b"") -> Root:
    """Return the root for a layout's *fingerprint*, the model's *epoch* and a tenant's *salt*."""
    seed = b"twfs root 1\0" + fingerprint + epoch.to_bytes(8, "little") + salt
    return Root(PrefixHash(xxhash.xxh3_128_digest(seed)), Digest(hashlib.sha256(seed).digest()))


@dataclass(frozen=True, slots=True)
class Names:
    """Names of n blocks in chain order, as the store wants them.

    *hashes*: n x 16 bytes; *digests*: n x 32; *parents*: n x 16, all zero bytes where the parent
    is not known; *positions*: end position of each in tokens, 0 where not known; *keys*: the
    engine's own keys, or empty for names made of token ids; *public*: how many leading ones are of
    the tenant's share group.
    """

    hashes: bytes
    digests: bytes
    parents: bytes
    positions: tuple[int, ...]
    keys: tuple[bytes, ...] = ()
    public: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    def hash_at(self, index: int) -> PrefixHash:
        """The prefix hash of block *index*."""
        return PrefixHash(self.hashes[16 * index : 16 * index + 16])

    def parent_at(self, index: int) -> PrefixHash:
        """The prefix hash before block *index*."""
        return PrefixHash(self.parents[16 * index : 16 * index + 16])

    def head(self, count: int) -> "Names":
        """The first *count* names."""
        return self.slice(0, count)

    def slice(self, start: int, stop: int) -> "Names":
        """The names from *start* up to *stop*."""
        return Names(
            self.hashes[16 * start : 16 * stop],
            self.digests[32 * start : 32 * stop],
            self.parents[16 * start : 16 * stop],
            self.positions[start:stop],
            self.keys[start:stop],
            max(0, min(self.public, stop) - start),
        )


def joined(parts: Sequence[Names]) -> Names:
    """The names of *parts*, one behind the other; public as far as the leading ones are."""
    public = 0
    for part in parts:
        public += part.public
        if part.public < len(part):
            break
    return Names(
        b"".join(part.hashes for part in parts),
        b"".join(part.digests for part in parts),
        b"".join(part.parents for part in parts),
        tuple(chain.from_iterable(part.positions for part in parts)),
        tuple(chain.from_iterable(part.keys for part in parts)),
        public,
    )


def check_names(names: Names) -> None:
    """Raise InvalidInput unless all parts of *names* are of its length, and fit a record."""
    count = len(names)
    lengths = (len(names.hashes), len(names.digests), len(names.parents), len(names.keys) or count)
    if lengths != (HASH_BYTES * count, DIGEST_BYTES * count, HASH_BYTES * count, count):
        raise InvalidInput(f"{count} positions, but hashes, digests, parents, keys of {lengths}")
    if any(len(key) > KEY_BYTES_MAX for key in names.keys):
        raise InvalidInput(f"an own key has more than {KEY_BYTES_MAX} bytes")
    if not 0 <= names.public <= count:
        raise InvalidInput(f"{names.public} of {count} names are said to be public")
    if count and not 0 <= min(names.positions) <= max(names.positions) <= POSITION_MAX:
        raise InvalidInput(f"end positions are 0 to {POSITION_MAX} tokens")


class Chain:
    """The names of one growing session; hashing is incremental, so a turn costs only its tokens.

    Only whole blocks have names: up to block_tokens - 1 trailing tokens wait for the next extend.
    The first *public_blocks* are a share group's, whose salt is in the root: *private*, the
    tenant's own salt, enters with the block behind them. Not thread-safe.
    """

    __slots__ = (
        "_digests", "_hashes", "_private", "_public", "_tail", "block_tokens", "root",
    )  # fmt: skip

    def __init__(
        self, root: Root, block_tokens: int, *, public_blocks: int = 0, private: bytes = b""
    ) -> None:
        self.root = root
        self._public = public_blocks
        self._private = private
        self.block_tokens = block_tokens
        self._hashes: list[bytes] = []
        self._digests: list[bytes] = []
        self._tail = b""  # u32 LE bytes of the tokens after the last whole block

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def tokens(self) -> TokenCount:
        """Tokens in whole blocks."""
        return TokenCount(len(self._hashes) * self.block_tokens)

    def extend(
        self,
        tokens: "Sequence[int] | npt.NDArray[np.integer[Any]]",
        extra: Sequence[bytes] = (),
    ) -> "Chain":
        """Append *tokens*; *extra* holds one bytes per whole block that this completes, or nothing.

        Extra bytes (LoRA name, hashes of images) are part of the block's name. InvalidInput on a
        token id outside u32 or on extra of the wrong count.
        """
        data = self._tail + tokens_to_bytes(tokens)
        step = 4 * self.block_tokens
        count = len(data) // step
        if extra and len(extra) != count:
            raise InvalidInput(f"{len(extra)} extra values for {count} whole blocks")
        prefix_hash = self._hashes[-1] if self._hashes else self.root.prefix_hash
        digest = self._digests[-1] if self._digests else self.root.digest
        name, prove = xxhash.xxh3_128_digest, hashlib.sha256
        for index in range(count):
            piece = data[index * step : (index + 1) * step]
            if extra:
                piece += extra[index]
            if self._public and len(self._hashes) == self._public:
                piece += self._private
            prefix_hash = PrefixHash(name(prefix_hash + piece))
            digest = Digest(prove(digest + piece).digest())
            self._hashes.append(prefix_hash)
            self._digests.append(digest)
        self._tail = data[count * step :]
        return self

    def names(self) -> Names:
        """The names of all whole blocks so far."""
        hashes = b"".join(self._hashes)
        count = len(self._hashes)
        return Names(
            hashes,
            b"".join(self._digests),
            (self.root.prefix_hash + hashes)[: 16 * count],
            tuple(range(self.block_tokens, (count + 1) * self.block_tokens, self.block_tokens)),
            public=min(count, self._public),
        )


def tokens_to_bytes(tokens: "Sequence[int] | npt.NDArray[np.integer[Any]]") -> bytes:
    """Pack token ids as u32 little-endian; InvalidInput on anything that is not one."""
    if not isinstance(tokens, Sequence):
        if tokens.dtype.kind not in "iu" or (
            tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 32)
        ):
            raise InvalidInput(TOKEN_RANGE)
        return tokens.astype("<u4").tobytes()
    try:
        return array("I", tokens).tobytes()
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidInput(f"{TOKEN_RANGE}: {error}") from error


@dataclass(frozen=True, slots=True)
class OwnKey:
    """An engine's own name of a block: a cryptographic hash of up to 64 bytes, and its place."""

    key: bytes
    parent: bytes | None = None
    end_position: int = 0


def names_of_keys(root: Root, keys: Sequence[OwnKey], *, public: bool = False) -> Names:
    """Return the names for engine keys: xxh3 over (root, key); the root holds model and salt.

    The keys themselves are stored beside the names and compared on match. The group is no part of
    the name: it stands beside it in every block's full name. *public* tells that *root* is a share
    group's. InvalidInput on an empty or over-long key.
    """
    hashes, digests, parents = [], [], []
    for own in keys:
        for key in (own.key, own.parent):
            if key is not None and not 1 <= len(key) <= KEY_BYTES_MAX:
                raise InvalidInput(
                    f"a key of {len(key)} bytes: an engine's key has 1 to {KEY_BYTES_MAX}"
                )
        hashes.append(xxhash.xxh3_128_digest(root.prefix_hash + own.key))
        digests.append(hashlib.sha256(root.digest + own.key).digest())
        parents.append(
            bytes(16)
            if own.parent is None
            else xxhash.xxh3_128_digest(root.prefix_hash + own.parent)
        )
    return Names(
        b"".join(hashes),
        b"".join(digests),
        b"".join(parents),
        tuple(own.end_position for own in keys),
        tuple(own.key for own in keys),
        len(keys) if public else 0,
    )


def names_of_run(
    root: Root, keys: Sequence[bytes], parent: bytes | None, end_positions: Sequence[int]
) -> Names:
    """As names_of_keys, of keys each of which is the parent of the next; *parent* is the first's.

    Half the work of names_of_keys. InvalidInput as there.
    """
    for key in (*keys, *(() if parent is None else (parent,))):
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise InvalidInput(
                f"a key of {len(key)} bytes: an engine's key has 1 to {KEY_BYTES_MAX}"
            )
    name, prove = xxhash.xxh3_128_digest, hashlib.sha256
    before, proof = root.prefix_hash, root.digest
    hashes = b"".join([name(before + key) for key in keys])
    above = bytes(HASH_BYTES) if parent is None else name(before + parent)
    return Names(
        hashes,
        b"".join([prove(proof + key).digest() for key in keys]),
        (above + hashes)[: HASH_BYTES * len(keys)],
        tuple(end_positions),
        tuple(keys),
    )
