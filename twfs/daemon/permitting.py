"""What a socket's peer may do: the one place where a request meets the rule of tenants.py.

`Permitted` is the warehouse as one user may see it. `permit` looks at requests that name a tenant,
its other methods at the blocks that a request names. Thread-safe, but for `may_report`.
"""

from typing import TYPE_CHECKING, Final

from twfs.core.operating import Verbs
from twfs.errors import NoSuchBlock, NoSuchModel, NotAllowed
from twfs.layout import Layout
from twfs.metadata.tables import MODEL_KEY
from twfs.prefix import Names
from twfs.protocol.messages import (
    AnyRequest,
    BeginPut,
    CheckAll,
    EvictBytes,
    ExplainNames,
    ForgetSession,
    LookupNames,
    MatchNames,
    Operate,
    ReportBlock,
    RetainNamed,
    TouchNames,
)
from twfs.records import BlockKey
from twfs.store import (
    BlockInfo,
    CheckReport,
    Explanation,
    Model,
    ModelInfo,
    Retention,
    SessionInfo,
    Space,
)
from twfs.tenants import EVERYBODY
from twfs.units import ByteCount, ModelId, PrefixHash

if TYPE_CHECKING:
    from twfs.warehouse import Warehouse

# What concerns everybody's blocks, and not only the asker's.
OPERATORS_ONLY: Final = (CheckAll, EvictBytes, Operate)
OWNERS_TOO: Final = frozenset({"purge"})  # verbs: of their own tenants
NAMING_A_TENANT: Final = (
    MatchNames, LookupNames, TouchNames, BeginPut, ExplainNames, ForgetSession,
    RetainNamed,
)  # fmt: skip
REPORTS_PER_SECOND: Final = 16.0  # each makes the daemon read a block
REPORTS_AT_ONCE: Final = 256.0  # a device that dies under a match of many blocks


class Permitted:
    """A warehouse as *uid* may see it; blocks of other tenants are as absent as those never put."""

    def __init__(self, warehouse: "Warehouse", uid: int) -> None:
        self._warehouse = warehouse
        self._uid = uid
        self._reports = REPORTS_AT_ONCE  # that may come now
        self._reported_s = 0.0

    @property
    def operates(self) -> bool:
        """Whether it is an operator's: root or the daemon's own user."""
        return self._uid in self._warehouse.tenants().operators

    def _mine(self, tenant: int) -> bool:
        return self._warehouse.tenants().may_act(self._uid, tenant)

    def permit(self, request: AnyRequest) -> None:
        """Raise NotAllowed unless this user may make *request*; NoSuchModel of files' blocks."""
        if self._is_of_files(request):
            raise NoSuchModel("files are read and written through the mount")
        if isinstance(request, NAMING_A_TENANT):
            self._warehouse.tenants().check_act(self._uid, request.tenant)
        elif isinstance(request, Operate) and request.verb in OWNERS_TOO:
            return  # the verb looks for itself
        elif isinstance(request, OPERATORS_ONLY) and not self.operates:
            raise NotAllowed(
                f"uid {self._uid} may not do this: only root and the daemon's own user operate it"
            )

    def _is_of_files(self, request: AnyRequest) -> bool:
        """Tell whether it names the model of the mounted files: their modes guard these."""
        model, key = getattr(request, "model", None), getattr(request, "key", None)
        if isinstance(key, bytes) and len(key) >= MODEL_KEY.size:
            model = MODEL_KEY.unpack_from(key)[0]
        record = self._warehouse.files.blocks.model
        return record is not None and model == record.id

    def may_report(self, request: ReportBlock, now_s: float) -> bool:
        """Tell whether to look at a block because of *request*: a hint, so it may be dropped.

        A user's hints are bounded: each costs a read of the device. *now_s* is any steady clock.
        """
        passed = (now_s - self._reported_s) * REPORTS_PER_SECOND
        self._reports = min(REPORTS_AT_ONCE, self._reports + passed)
        self._reported_s = now_s
        if self._reports < 1:
            return False
        self._reports -= 1
        try:
            self.block_info(BlockKey.unpack(request.key))
        except (NoSuchBlock, ValueError):
            return False
        return True

    # What everybody may.

    def models(self) -> list[ModelInfo]:
        """See Namespace.models: names, layouts and sizes are no secret of a tenant's."""
        return self._warehouse.models()

    def space(self) -> Space:
        """See Namespace.space."""
        return self._warehouse.space()

    def changes(self) -> int:
        """See Namespace.changes."""
        return self._warehouse.changes()

    def new_epoch(self, model: Model) -> Model:
        """See Store.new_epoch: whoever runs the engine knows when its weights have changed."""
        return self._warehouse.new_epoch(model)

    # What only operators may: `permit` has seen to it.

    @property
    def verbs(self) -> Verbs:
        """See core/operating.py."""
        if self.operates:
            return self._warehouse.verbs
        return self._warehouse.purger.verbs(self._uid)

    def evict(self, wanted_bytes: ByteCount) -> ByteCount:
        """See Namespace.evict. Blocks."""
        return self._warehouse.evict(wanted_bytes)

    def check(self, *, data: bool = False) -> CheckReport:
        """See Namespace.check. Blocks."""
        return self._warehouse.check(data=data)

    # What depends on the tenant.

    def open_model(
        self, name: str, layout: Layout | None = None, *, tenant: str | None = None
    ) -> Model:
        """See Store.open_model; NotAllowed unless this user may act for *tenant*."""
        self._warehouse.tenants().check_name(self._uid, tenant)
        return self._warehouse.open_model(name, layout, tenant=tenant)

    def heads(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[PrefixHash]:
        """See Namespace.heads."""
        if self.operates:
            return self._warehouse.heads(model, after=after, limit=limit)
        return self._warehouse.heads(model, after=after, limit=limit, mine=self._mine)

    def sessions(
        self, model: ModelId, *, after: PrefixHash | None = None, limit: int = 1000
    ) -> list[SessionInfo]:
        """See Namespace.sessions."""
        if self.operates:
            return self._warehouse.sessions(model, after=after, limit=limit)
        return self._warehouse.sessions(model, after=after, limit=limit, mine=self._mine)

    def detached(self, model: ModelId) -> list[BlockKey]:
        """See Namespace.detached."""
        if self.operates:
            return self._warehouse.detached(model)
        return self._warehouse.detached(model, mine=self._mine)

    def chain_of(self, model: ModelId, prefix_hash: PrefixHash) -> list[BlockInfo]:
        """See Namespace.chain_of; NoSuchBlock for another tenant's."""
        infos = self._warehouse.chain_of(model, prefix_hash)
        if not all(self._mine(tenant) for tenant in {info.block.tenant for info in infos}):
            raise _absent(prefix_hash)
        return infos

    def block_info(self, key: BlockKey) -> BlockInfo:
        """See Namespace.block_info; NoSuchBlock for another tenant's."""
        info = self._warehouse.block_info(key)
        if not self._mine(info.block.tenant):
            raise _absent(key.prefix_hash)
        return info

    def read_block(self, info: BlockInfo) -> memoryview:
        """See Namespace.read_block; NoSuchBlock for another tenant's. Blocks."""
        # The record of the request is the asker's word: what counts is the one of that life here.
        self.block_info(info.key)
        return self._warehouse.read_block(info)

    def remove(self, model: ModelId, head: PrefixHash, *, below: bool = False) -> ByteCount:
        """See Namespace.remove; NoSuchBlock for another tenant's. Blocks."""
        self.chain_of(model, head)
        if below and self._group_s(model, head):
            raise NotAllowed(
                f"what goes on from the public block {head.hex()} may be other tenants': remove "
                "your sessions one by one"
            )
        return self._warehouse.remove(model, head, below=below)

    def _group_s(self, model: ModelId, prefix_hash: PrefixHash) -> bool:
        """Tell whether a block is a share group's, and this user no operator."""
        last = self.chain_of(model, prefix_hash)[-1]
        return not self.operates and self._warehouse.tenants().is_group(last.block.tenant)

    def set_retention(self, model: ModelId, head: PrefixHash, retention: Retention) -> None:
        """See Namespace.set_retention; NoSuchBlock for another tenant's. Blocks."""
        self.chain_of(model, head)
        self._warehouse.set_retention(model, head, retention)

    def retain(
        self, model: ModelId, session: str, retention: Retention, *, tenant: int = EVERYBODY
    ) -> None:
        """See Namespace.retain; NotAllowed unless this user may act for *tenant*. Blocks."""
        self._warehouse.tenants().check_act(self._uid, tenant)
        self._warehouse.retain(model, session, retention, tenant=tenant)

    def forget_session(self, model: ModelId, session: str, tenant: int) -> ByteCount:
        """See Store.forget; `permit` has seen to it that this user may act for *tenant*. Blocks."""
        return self._warehouse.forget_session(model, session, tenant)

    def explain(self, model: ModelId, names: Names, *, tenant: int = EVERYBODY) -> Explanation:
        """See Namespace.explain; NotAllowed unless this user may act for *tenant*."""
        self._warehouse.tenants().check_act(self._uid, tenant)
        return self._warehouse.explain(model, names, tenant=tenant)


def _absent(prefix_hash: PrefixHash) -> NoSuchBlock:
    """The error for a block that the asker may not know of, as if it were not there."""
    return NoSuchBlock(f"no block {prefix_hash.hex()}")
