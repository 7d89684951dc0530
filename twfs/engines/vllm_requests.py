"""A request as vLLM's scheduler knows it: the keys of its chain, what is held of it, its load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """See the module's docstring. *hashes* are the engine's own, which grow and may shrink."""

    hashes: Sequence[bytes]
    hashes_per_key: int = 1
    start: int = 0  # blocks that the engine held itself when it asked
    blocks: int | None = None  # that lookups may count on, from there
    loading: Sequence[Sequence[int]] = ()  # the engine's blocks
    load_tokens: int = 0
    load_begun_s: float = 0.0
    _keys: list[bytes] = field(default_factory=list)

    def keys(self) -> Sequence[bytes]:
        """The keys of the whole blocks so far. Not copied where each hash is one."""
        step, hashes, keys = self.hashes_per_key, self.hashes, self._keys
        if step == 1:
            return hashes
        while keys and keys[-1:] != hashes[step * len(keys) - 1 : step * len(keys)]:
            keys.pop()
        keys.extend(hashes[step * len(keys) + step - 1 :: step])
        return keys


def places_of(
    keys: Sequence[Any], end_of: Callable[[Any], int], block_tokens: int
) -> Sequence[int]:
    """Where *keys*, in order, are in their chain, in which they end at tokens *end_of* them."""
    if not keys:
        return ()
    first, last = (end_of(key) // block_tokens - 1 for key in (keys[0], keys[-1]))
    if last - first == len(keys) - 1:  # neighbours, as nearly always: there may be thousands
        return range(first, last + 1)
    return [end_of(key) // block_tokens - 1 for key in keys]
