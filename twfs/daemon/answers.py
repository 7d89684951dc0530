"""Answers of the daemon to requests that need no connection: models, listings, tools.

Each function blocks and runs in a worker thread. Puts, leases and the order of replies are in
connection.py.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from twfs.core.operating import operate
from twfs.daemon.permitting import Permitted
from twfs.protocol.codec import (
    block_info_to_wire,
    key_of,
    layout_of,
    model_info_to_wire,
    model_of,
    model_to_wire,
    names_of,
)
from twfs.protocol.messages import (
    AnyReply,
    AskChanges,
    AskSpace,
    BlockRows,
    CheckAll,
    Checked,
    Counted,
    Done,
    EvictBytes,
    Explained,
    ExplainNames,
    ForgetSession,
    HashRows,
    InfoOfBlock,
    KeyRows,
    ListChain,
    ListDetached,
    ListHeads,
    ListModels,
    ListSessions,
    ModelRows,
    NewEpoch,
    Opened,
    OpenModel,
    Operate,
    Operated,
    RemoveSession,
    RetainNamed,
    RetainSession,
    SessionRows,
    SpaceFigures,
    Status,
)
from twfs.protocol.wire import LISTED_MAX
from twfs.store import CheckReport
from twfs.units import ByteCount, ModelId, PrefixHash


def status_of(message_id: int, statistics: Mapping[str, Any]) -> Status:
    """Return *statistics* as an answer; what JSON does not know goes as its text."""
    return Status(message_id, json.dumps(statistics, default=str).encode())


def _open_model(warehouse: Permitted, request: OpenModel) -> AnyReply:
    layout = None if request.layout is None else layout_of(request.layout)
    model = warehouse.open_model(request.name, layout, tenant=request.tenant)
    return Opened(
        request.id, model_to_wire(model), model.tenant, model.salt, model.public_salt
    )  # fmt: skip


def _new_epoch(warehouse: Permitted, request: NewEpoch) -> AnyReply:
    return Opened(request.id, model_to_wire(warehouse.new_epoch(model_of(request.model))))


def _models(warehouse: Permitted, request: ListModels) -> AnyReply:
    infos = [info for info in warehouse.models() if info.name > request.after]
    infos.sort(key=lambda info: info.name)
    return ModelRows(request.id, tuple(map(model_info_to_wire, infos[: request.limit])))


def _after(request: ListHeads | ListSessions) -> PrefixHash | None:
    """The hash behind which a listing begins."""
    return None if request.after is None else PrefixHash(request.after)


def _heads(warehouse: Permitted, request: ListHeads) -> AnyReply:
    heads = warehouse.heads(ModelId(request.model), after=_after(request), limit=request.limit)
    return HashRows(request.id, b"".join(heads))


def _sessions(warehouse: Permitted, request: ListSessions) -> AnyReply:
    model = ModelId(request.model)
    sessions = warehouse.sessions(model, after=_after(request), limit=request.limit)
    return SessionRows(request.id, tuple(sessions))


def _detached(warehouse: Permitted, request: ListDetached) -> AnyReply:
    keys = sorted(key.pack() for key in warehouse.detached(ModelId(request.model)))
    behind = [key for key in keys if request.after is None or key > request.after]
    return KeyRows(request.id, b"".join(behind[: request.limit]))


def _chain(warehouse: Permitted, request: ListChain) -> AnyReply:
    infos = warehouse.chain_of(ModelId(request.model), PrefixHash(request.prefix_hash))
    asked = infos[request.first : request.first + request.limit]
    return BlockRows(request.id, tuple(map(block_info_to_wire, asked)))


def _info(warehouse: Permitted, request: InfoOfBlock) -> AnyReply:
    info = warehouse.block_info(key_of(request.key))
    return BlockRows(request.id, (block_info_to_wire(info),))


def _remove(warehouse: Permitted, request: RemoveSession) -> AnyReply:
    head = PrefixHash(request.head)
    freed = warehouse.remove(ModelId(request.model), head, below=request.below)
    return Counted(request.id, freed)


def _retain(warehouse: Permitted, request: RetainSession) -> AnyReply:
    head = PrefixHash(request.head)
    warehouse.set_retention(ModelId(request.model), head, request.retention)
    return Done(request.id)


def _retain_named(warehouse: Permitted, request: RetainNamed) -> AnyReply:
    model = ModelId(request.model)
    warehouse.retain(model, request.session, request.retention, tenant=request.tenant)
    return Done(request.id)


def _forget(warehouse: Permitted, request: ForgetSession) -> AnyReply:
    freed = warehouse.forget_session(ModelId(request.model), request.session, request.tenant)
    return Counted(request.id, freed)


def _evict(warehouse: Permitted, request: EvictBytes) -> AnyReply:
    return Counted(request.id, warehouse.evict(ByteCount(request.wanted_bytes)))


def _explain(warehouse: Permitted, request: ExplainNames) -> AnyReply:
    explanation = warehouse.explain(
        ModelId(request.model), names_of(request.names), tenant=request.tenant
    )
    return Explained(request.id, explanation)


def _space(warehouse: Permitted, request: AskSpace) -> AnyReply:
    return SpaceFigures(request.id, warehouse.space())


def _check(warehouse: Permitted, request: CheckAll) -> AnyReply:
    report = warehouse.check(data=request.data)
    findings = report.findings[:LISTED_MAX]  # more of them would not fit a frame
    report = CheckReport(findings, report.blocks, report.payloads, report.seconds)
    return Checked(request.id, report)


def _changes(warehouse: Permitted, request: AskChanges) -> AnyReply:
    return Counted(request.id, warehouse.changes())


def _operate(warehouse: Permitted, request: Operate) -> AnyReply:
    result = operate(warehouse.verbs, request.verb, request.arguments)
    return Operated(request.id, result)


ANSWERS: Final[Mapping[type[Any], Callable[[Permitted, Any], AnyReply]]] = {
    OpenModel: _open_model,
    NewEpoch: _new_epoch,
    ListModels: _models,
    ListHeads: _heads,
    ListSessions: _sessions,
    ListDetached: _detached,
    ListChain: _chain,
    InfoOfBlock: _info,
    RemoveSession: _remove,
    RetainSession: _retain,
    RetainNamed: _retain_named,
    ForgetSession: _forget,
    EvictBytes: _evict,
    ExplainNames: _explain,
    AskSpace: _space,
    CheckAll: _check,
    AskChanges: _changes,
    Operate: _operate,
}
