"""The Namespace half of an open warehouse: what tools and the mount ask of it, in this process.

Over a socket the same is asked in protocol/remote.py. Methods are thread-safe; those that say so
block on devices or commits, all others are short enough for an event loop.
"""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from twfs.admin.members import Members
from twfs.checking import invariants
from twfs.checking.scrubbing import Scrubber
from twfs.checking.subject import Live
from twfs.core import listing, metering
from twfs.core.listing import Mine, anyones
from twfs.core.operating import Verbs, operate
from twfs.core.state import Core
from twfs.datapath import matching
from twfs.datapath.sources import Sources
from twfs.devices.arena import Arena
from twfs.errors import BadPayload, DeviceError
from twfs.eviction import evicting, retaining
from twfs.hints import check_session
from twfs.policy.retention import figures as retention_figures
from twfs.prefix import Names
from twfs.records import BlockKey
from twfs.store import BlockInfo, CheckReport, Explanation, ModelInfo, Retention, SessionInfo, Space
from twfs.tenants import EVERYBODY, Tenants
from twfs.units import ByteCount, DeviceIndex, ModelId, PrefixHash


class OpenNamespace:
    """A Namespace over the parts that the subclass keeps open."""

    scrubber: Scrubber
    verbs: Verbs
    _core: Core
    _members: Members
    _sources: Sources
    _arena: Arena | None

    def _using(self) -> AbstractContextManager[None]:
        """Keep the warehouse open during a call that blocks; WarehouseClosed if it is not."""
        raise NotImplementedError

    def tenants(self) -> Tenants:
        """See Namespace.tenants."""
        return self._core.tenants

    def models(self) -> list[ModelInfo]:
        """See Namespace.models."""
        return listing.models(self._core)

    def heads(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000,
        mine: Mine = anyones,
    ) -> list[PrefixHash]:  # fmt: skip
        """See Namespace.heads; only of the tenants that are *mine*."""
        return listing.heads(self._core, model, after, limit, mine)

    def sessions(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000,
        mine: Mine = anyones,
    ) -> list[SessionInfo]:  # fmt: skip
        """See Namespace.sessions; only of the tenants that are *mine*."""
        return listing.sessions(self._core, model, after, limit, mine)

    def detached(self, model: ModelId, *, mine: Mine = anyones) -> list[BlockKey]:
        """See Namespace.detached; only of the tenants that are *mine*."""
        return listing.detached(self._core, model, mine)

    def chain_of(self, model: ModelId, prefix_hash: PrefixHash) -> list[BlockInfo]:
        """See Namespace.chain_of."""
        return listing.chain_of(self._core, model, prefix_hash)

    def block_info(self, key: BlockKey) -> BlockInfo:
        """See Namespace.block_info."""
        return listing.block_info(self._core, key)

    def read_block(self, info: BlockInfo) -> memoryview:
        """See Namespace.read_block; a block that is lost becomes a hole. Blocks."""
        with self._using():
            try:
                return listing.read_block(self._core, info)
            except (BadPayload, DeviceError):
                evicting.spoil(self._core, info.key, info.block.generation)
                raise

    def remove(self, model: ModelId, head: PrefixHash, *, below: bool = False) -> ByteCount:
        """See Namespace.remove. Blocks."""
        with self._using():
            return evicting.remove_session(self._core, model, head, below=below)

    def set_retention(self, model: ModelId, head: PrefixHash, retention: Retention) -> None:
        """See Namespace.set_retention. Blocks."""
        with self._using():
            retaining.set_retention(self._core, model, head, retention)

    def retain(
        self, model: ModelId, session: str, retention: Retention, *, tenant: int = EVERYBODY
    ) -> None:
        """See Namespace.retain. Blocks."""
        with self._using():
            retaining.retain(self._core, model, tenant, check_session(session), retention)

    def evict(self, wanted_bytes: ByteCount) -> ByteCount:
        """See Namespace.evict. Blocks."""
        with self._using():
            return evicting.evict(self._core, wanted_bytes)

    def explain(self, model: ModelId, names: Names, *, tenant: int = EVERYBODY) -> Explanation:
        """See Namespace.explain."""
        return matching.explain(self._core, model, names, tenant)

    def space(self) -> Space:
        """See Namespace.space."""
        return listing.space(self._core)

    def check(self, *, data: bool = False) -> CheckReport:
        """See Namespace.check. Blocks."""
        with self._using():
            return invariants.run(Live.of(self._core), data=data)

    def operate(self, verb: str, **arguments: Any) -> Any:
        """See Namespace.operate. Blocks."""
        with self._using():
            result = operate(self.verbs, verb, msgspec.json.encode(arguments))
        return msgspec.json.decode(result)

    def changes(self) -> int:
        """See Namespace.changes."""
        return self._core.changes

    def device_paths(self) -> dict[DeviceIndex, Path]:
        """See Namespace.device_paths."""
        return {DeviceIndex(index): each.path for index, each in self._core.devices.items()}

    def statistics(self) -> dict[str, Any]:
        """See Namespace.statistics."""
        core = self._core
        with core.lock, core.metadata.read() as view:
            figures: dict[str, Any] = {
                "warehouse": str(core.uuid),
                "directory": str(core.directory),
                "durability": str(core.metadata.durability),
                "counters": asdict(core.counters),
                "served": {name: asdict(served) for name, served in core.served.items()},
                "slots": core.slots.statistics(),
                "eviction": {"policy": core.policy.name},
                "admission": core.gate.statistics(),
                "record": core.recorder.statistics(),
                "leases": core.leases.statistics(),
                "allocator": asdict(core.allocator.statistics()),
                "records": view.counts(),
                "changes": core.changes,
                "tenants": metering.figures(core),
            }
            figures["retention"] = retention_figures(
                core.slots, core.terms, core.promises, core.allocator.total_bytes
            )
            figures["sessions"] = view.count("sessions")
            figures["promises_refused"] = core.promises.refused
        figures["space"] = asdict(self.space())
        figures["metadata"] = core.metadata.statistics()
        figures["devices"] = self._members.listed()
        figures["scrub"] = self.scrubber.status()
        figures["readers"] = self._sources.now().statistics()
        figures["arena"] = None if self._arena is None else self._arena.statistics()
        return figures
