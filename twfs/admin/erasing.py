"""Eviction and removal that leave no header behind: what is erased, no rebuild brings back.

The order: the removal is durable; then the headers are overwritten and flushed; only then may the
extents be handed out (Core.hand_out). A crash between leaves headers of blocks that are gone, but
nobody has been told that they are erased. What a lease still reads is erased when that ends.
Earlier lives of the same blocks, evicted without erasing, may still lie elsewhere. Blocks.
"""

from typing import Any

import msgspec

from twfs.core.operating import NoArguments, Verb, Verbs
from twfs.core.state import Core
from twfs.errors import InvalidInput, NoSuchModel
from twfs.eviction.evicting import freed_bytes, remove_session, submit_eviction
from twfs.units import HASH_BYTES, PrefixHash


class EvictErasing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evict about so much, in order."""

    wanted_bytes: int


class RemoveErasing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Remove the session of a *model* (its name) that ends with *head* (32 hex digits)."""

    model: str
    head: str


def _evict(core: Core, asked: EvictErasing) -> dict[str, Any]:
    if not 0 <= asked.wanted_bytes < 1 << 62:
        raise InvalidInput(f"{asked.wanted_bytes} bytes cannot be evicted")
    freed = freed_bytes(submit_eviction(core, asked.wanted_bytes, erase=True))
    core.wiper.wait()
    return {"freed_bytes": freed, "waiting_blocks": _waiting(core)}


def _remove(core: Core, asked: RemoveErasing) -> dict[str, Any]:
    try:
        head = bytes.fromhex(asked.head)
    except ValueError:
        head = b""
    if len(head) != HASH_BYTES:
        raise InvalidInput(f"{asked.head[:64]!r} is not a prefix hash")
    with core.lock:
        model = core.current.get(asked.model)
    if model is None:
        raise NoSuchModel(f"no model {asked.model[:200]!r}")
    freed = remove_session(core, model, PrefixHash(head), erase=True)
    core.wiper.wait()
    return {"freed_bytes": freed, "waiting_blocks": _waiting(core)}


def _waiting(core: Core) -> int:
    """Blocks that will be erased when their leases end."""
    with core.lock:
        return len(core.to_erase & core.limbo.keys())


def _settle(core: Core) -> None:
    """Wait until all removals queued so far, also those in the background, have made their room."""
    core.metadata.submit(lambda _: None, settled=lambda _: None).result()


def verbs(core: Core) -> Verbs:
    """`evict_erasing` and `remove_erasing`; DeviceError if a header could not be overwritten.

    And `settle`, which waits for evictions in the background.
    """
    return {
        "settle": Verb(NoArguments, lambda _: _settle(core)),
        "evict_erasing": Verb(EvictErasing, lambda asked: _evict(core, asked)),
        "remove_erasing": Verb(RemoveErasing, lambda asked: _remove(core, asked)),
    }
