"""Public traces as they are published, as sessions of requests: the only module that parses them.

kv-cache-tester: one JSON file a session. `hash_ids` name `block_size` tokens each and mean the same
text within one file (`hash_id_scope` local) or within all (global); `t` is in seconds from the
session's start, of a sub-agent's requests from the sub-agent's. Mooncake: JSONL, a request a line,
global `hash_ids` of 512 tokens, `timestamp` in ms; its requests belong to no session.

A request's ids cover its prompt. What it answers has no ids before a later prompt contains it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from twfs.errors import InvalidInput

MOONCAKE_BLOCK_TOKENS: Final = 512
MOONCAKE_MODEL: Final = "mooncake"
DEPTH_MAX: Final = 16  # sub-agents of sub-agents; more is no recording but damage
LINE_BYTES_MAX: Final = 16 << 20  # of a JSONL trace: a prompt of a million tokens has 20 KB

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]


@dataclass(frozen=True, slots=True)
class Request:
    """One request; *ids* name the session's `id_tokens` of its prompt each, whole ones only."""

    at_s: float  # from the session's start
    agent: str  # "" for the session's own, else the sub-agent's path
    model: str
    ids: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    stop: str  # why it ended: "tool_use", "end_turn", another word, or ""
    think_s: float | None  # between the answer before and this request
    answer_s: float = 0.0  # from its arrival to the end of its answer; 0 where that is not recorded


@dataclass(frozen=True, slots=True)
class Agent:
    """How many tokens of tool definitions, then of system prompt, an agent's prompts begin with."""

    tool_tokens: int = 0
    system_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """Requests in order of time, sub-agents' too; *scope*: where equal ids mean equal text."""

    name: str
    scope: str  # "" for all sessions, else this session's
    id_tokens: int
    requests: tuple[Request, ...]
    agents: dict[str, Agent]
    absolute: bool = False  # its times are the trace's own: it starts when that says


class _Recorded(msgspec.Struct):
    """A request or a sub-agent of a kv-cache-tester file; of the latter only some fields."""

    t: _Seconds
    type: str = ""
    model: str = ""
    prompt_tokens: _Count = msgspec.field(name="in", default=0)
    out: _Count = 0
    hash_ids: list[_Count] = []
    stop: str | None = None
    think_time: float | None = None
    api_time: Annotated[float, msgspec.Meta(ge=0, le=1e7)] | None = None
    agent_id: str = ""
    tool_tokens: _Count = 0
    system_tokens: _Count = 0
    requests: "list[_Recorded] | None" = None


class _File(msgspec.Struct):
    """A kv-cache-tester session file."""

    id: str
    requests: list[_Recorded]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    hash_id_scope: str = "local"
    tool_tokens: _Count = 0
    system_tokens: _Count = 0


class _Line(msgspec.Struct):
    """A line of a Mooncake trace."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e13)]
    input_length: _Count
    hash_ids: list[_Count]
    output_length: _Count = 0


_FILE: Final = msgspec.json.Decoder(_File)
_LINE: Final = msgspec.json.Decoder(_Line)


def read_traces(paths: Sequence[Path]) -> list[Session]:
    """Read every trace named: files, and all `*.json` and `*.jsonl` files of folders.

    InvalidInput if there is none, or if one is not what its format says.
    """
    files = sorted(
        file
        for path in paths
        for file in ([path] if not path.is_dir() else [*path.glob("*.json"), *path.glob("*.jsonl")])
    )
    sessions = [session for file in files for session in _read(file)]
    if not any(session.requests for session in sessions):
        named = ", ".join(map(str, paths))
        raise InvalidInput(f"no request in {named}: name *.json sessions or a *.jsonl trace")
    return sessions


def _read(path: Path) -> Iterable[Session]:
    """The sessions of one file, by the kind of file it is."""
    return [_mooncake(path)] if path.suffix == ".jsonl" else [_session(path)]


def _mooncake(path: Path) -> Session:
    """All requests of a Mooncake trace, as one session without name."""
    requests = []
    with path.open("rb") as file:
        number = 0
        while text := file.readline(LINE_BYTES_MAX):
            number += 1
            if not text.strip():
                continue
            try:
                line = _LINE.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InvalidInput(f"{path}, line {number}: {error}") from error
            whole = min(len(line.hash_ids), line.input_length // MOONCAKE_BLOCK_TOKENS)
            requests.append(
                Request(
                    line.timestamp / 1000, "", MOONCAKE_MODEL, tuple(line.hash_ids[:whole]),
                    line.input_length, line.output_length, "", None,
                )
            )  # fmt: skip
    requests.sort(key=lambda request: request.at_s)
    return Session("", "", MOONCAKE_BLOCK_TOKENS, tuple(requests), {"": Agent()}, absolute=True)


def _session(path: Path) -> Session:
    """One kv-cache-tester session."""
    try:
        file = _FILE.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from error
    if file.hash_id_scope not in {"local", "global"}:
        raise InvalidInput(f"{path}: hash_id_scope is local or global, not {file.hash_id_scope!r}")
    agents = {"": Agent(file.tool_tokens, file.system_tokens)}
    requests = list(_leaves(file.requests, file.block_size, "", 0.0, agents))
    requests.sort(key=lambda request: request.at_s)
    scope = file.id if file.hash_id_scope == "local" else ""
    return Session(file.id, scope, file.block_size, tuple(requests), agents)


def _leaves(
    recorded: list[_Recorded], id_tokens: int, agent: str, start_s: float, agents: dict[str, Agent]
) -> Iterator[Request]:
    """The requests of *recorded* and of the sub-agents in it; notes these in *agents*.

    A sub-agent's times count from its own start; recordings whose first is not before that are
    taken to count from the session's.
    """
    for number, each in enumerate(recorded):
        if each.requests is None:
            whole = min(len(each.hash_ids), each.prompt_tokens // id_tokens)
            yield Request(
                start_s + each.t, agent, each.model, tuple(each.hash_ids[:whole]),
                each.prompt_tokens, each.out, each.stop or "", each.think_time,
                each.api_time or 0.0,
            )  # fmt: skip
            continue
        name = f"{agent}/{each.agent_id or number}"
        if name.count("/") > DEPTH_MAX:
            raise InvalidInput(f"sub-agents within more than {DEPTH_MAX} others: {name}")
        agents[name] = Agent(each.tool_tokens, each.system_tokens)
        absolute = bool(each.requests) and each.t > 0 and each.requests[0].t >= each.t
        inner_s = start_s if absolute else start_s + each.t
        yield from _leaves(each.requests, id_tokens, name, inner_s, agents)


def halves(sessions: Sequence[Session]) -> tuple[list[Session], list[Session]]:
    """Every other session by name: one half to learn on, the other to report on."""
    ordered = sorted(sessions, key=lambda session: session.name)
    return ordered[0::2], ordered[1::2]


def span_s(sessions: Sequence[Session]) -> float:
    """Seconds of the longest session."""
    return max((each.requests[-1].at_s for each in sessions if each.requests), default=0.0)
