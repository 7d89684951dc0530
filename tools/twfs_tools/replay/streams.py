"""Sessions that start over a window, as one stream of requests over numbered blocks.

A block is `block_tokens` tokens of one model, for one tenant, after one chain of blocks; its name
is the number of the first request of the stream in which it occurs, so a parent's number is below
its children's. Only whole blocks have one: tokens behind the last of them are always missed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twfs.errors import InvalidInput
from twfs_tools.replay.traces import Request, Session

IntArray = npt.NDArray[np.int64]
NO_PARENT: Final = -1
BLOCK_TOKENS: Final = 256  # where the trace's own ids divide it
GAP_MS: Final = 1  # between requests of one moment: policies see them one after the other

TenantOf = Callable[[str], str]


@dataclass(frozen=True)
class Stream:
    """Requests in order of time, and the tree of the blocks that they ask for.

    Of n requests, b blocks and r references to them. `first` has n + 1 elements: request i asks for
    `blocks[first[i]:first[i + 1]]`, a chain from its first block on.
    """

    block_tokens: int
    at_ms: IntArray  # (n,) from the stream's start
    answered_ms: IntArray  # (n,) when the answer ends, not behind the session's next request
    session: IntArray  # (n,) into sessions
    model: IntArray  # (n,) into models
    tenant: IntArray  # (n,) into tenants
    prompt_tokens: IntArray  # (n,)
    answer_tokens: IntArray  # (n,)
    stop: list[str]  # (n,)
    first: IntArray  # (n + 1,)
    blocks: IntArray  # (r,)
    parent: IntArray  # (b,) NO_PARENT for the first of a chain
    depth: IntArray  # (b,) 0 for the first of a chain
    block_model: IntArray  # (b,)
    block_tenant: IntArray  # (b,)
    sessions: list[str]  # a sub-agent is a session of its own, below the one that started it
    models: list[str]
    tenants: list[str]

    def __len__(self) -> int:
        return len(self.at_ms)

    @property
    def unique_blocks(self) -> int:
        """Blocks of an infinite store at the end: the footprint."""
        return len(self.parent)

    def chain(self, number: int) -> IntArray:
        """The blocks of request *number*."""
        return self.blocks[self.first[number] : self.first[number + 1]]

    def moments(self) -> list[tuple[int, int, bool]]:
        """Every request's arrival and, True, the end of its answer, in order: (ms, number, end)."""
        arrivals = [(ms, number, False) for number, ms in enumerate(self.at_ms.tolist())]
        ends = [(ms, number, True) for number, ms in enumerate(self.answered_ms.tolist())]
        return sorted(arrivals + ends)

    def chains(self) -> Iterator[IntArray]:
        """The blocks of every request, in order."""
        return (self.chain(number) for number in range(len(self)))

    def lengths(self) -> IntArray:
        """Blocks of every request."""
        return np.diff(self.first)


@dataclass
class _Tree:
    """Blocks by what they follow and what they are, numbered as they come."""

    numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    root: list[int] = field(default_factory=list)

    def number(self, parent: int, root: int, what: tuple[Any, ...]) -> int:
        """The block that is *what* after *parent*, in the tree below *root*."""
        key = (root if parent == NO_PARENT else NO_PARENT, parent, *what)
        known = self.numbers.get(key)
        if known is None:
            known = self.numbers[key] = len(self.parent)
            self.parent.append(parent)
            self.depth.append(0 if parent == NO_PARENT else self.depth[parent] + 1)
            self.root.append(root)
        return known


@dataclass
class _Namer:
    """Names of the blocks of one session's requests."""

    tree: _Tree
    session: Session
    ids_per_block: int
    share: bool
    before: dict[int, tuple[npt.NDArray[np.int64], list[int]]] = field(default_factory=dict)
    opening: dict[tuple[str, str], tuple[tuple[Any, ...], ...]] = field(default_factory=dict)

    def name(self, request: Request, root: int) -> list[int]:
        """The blocks of *request*; what it has in common with the one before costs little."""
        step = self.ids_per_block
        count = len(request.ids) // step
        ids = np.array(request.ids[: count * step], np.int64).reshape(count, step)
        known, names = self.before.get(root, (np.zeros((0, step), np.int64), []))
        common = min(count, len(known))
        same = (ids[:common] == known[:common]).all(axis=1)
        start = common if same.all() else int(same.argmin())
        names = names[:start]
        shared = self._shared(request, ids) if self.share else ()
        for index, group in enumerate(ids[start:].tolist(), start):
            what: tuple[Any, ...] = (self.session.scope, *group)
            # While all before was the agent's tools and system prompt, so may be this.
            if index < len(shared) and shared[index][0] == what:
                what = shared[index][1]
            names.append(self.tree.number(names[-1] if names else NO_PARENT, root, what))
        self.before[root] = (ids, names)
        return list(names)

    def _shared(self, request: Request, ids: npt.NDArray[np.int64]) -> tuple[tuple[Any, ...], ...]:
        """Of every block of tools and system prompt: what it is here, and what for all sessions.

        Sessions whose tools have as many tokens are taken to have the same ones; likewise, after
        the same tools, system prompts. An agent's first request shows how these begin here.
        """
        key = (request.agent, request.model)
        found = self.opening.get(key)
        if found is None:
            agent = self.session.agents[request.agent]
            tokens = self.session.id_tokens * self.ids_per_block
            both = agent.tool_tokens + agent.system_tokens
            made = []
            for index, group in enumerate(ids[: both // tokens].tolist()):
                tools = (index + 1) * tokens <= agent.tool_tokens
                system = NO_PARENT if tools else agent.system_tokens
                made.append(
                    ((self.session.scope, *group), ("shared", agent.tool_tokens, system, index))
                )
            found = self.opening[key] = tuple(made)
        return found


def block_tokens_for(sessions: Sequence[Session], wanted: int | None) -> int:
    """Tokens of a block: *wanted*, else 256 or what the trace has; InvalidInput if it cannot be."""
    own = {session.id_tokens for session in sessions}
    tokens = wanted or max(BLOCK_TOKENS, *own)
    for each in own:
        if tokens % each:
            raise InvalidInput(
                f"blocks of {tokens} tokens from ids of {each}: give a multiple of it as "
                "--block-tokens"
            )
    return tokens


def starts_s(sessions: Sequence[Session], window_s: float, seed: int) -> list[float]:
    """When each session starts: anywhere in the window; 0 for traces with times of their own."""
    drawn = random.Random(seed)  # the same on every machine and version
    starts = [drawn.uniform(0.0, window_s) for _ in sessions]
    return [
        0.0 if session.absolute else start for session, start in zip(sessions, starts, strict=True)
    ]


def make_stream(
    sessions: Sequence[Session], *, window_s: float, seed: int, block_tokens: int | None = None,
    share_prefixes: bool = False, tenant_of: TenantOf = lambda _: "",
) -> Stream:  # fmt: skip
    """Let *sessions* start over *window_s* seconds, drawn with *seed*; InvalidInput.

    *share_prefixes*: tools and system prompts that look alike are the same blocks for all sessions
    of a tenant. *tenant_of*: the tenant of a session's name.
    """
    tokens = block_tokens_for(sessions, block_tokens)
    events = [
        (start + request.at_s, number, place)
        for number, (session, start) in enumerate(
            zip(sessions, starts_s(sessions, window_s, seed), strict=True)
        )
        for place, request in enumerate(session.requests)
    ]
    events.sort()
    builder = _Builder(tokens, share_prefixes, tenant_of)
    for at_s, number, place in events:
        builder.add(sessions[number], number, sessions[number].requests[place], at_s)
    return builder.stream()


class _Builder:
    """Takes requests in order of time."""

    def __init__(self, block_tokens: int, share: bool, tenant_of: TenantOf) -> None:
        self._tokens = block_tokens
        self._share = share
        self._tenant_of = tenant_of
        self._tree = _Tree()
        self._namers: dict[int, _Namer] = {}
        self._numbers: dict[str, dict[Any, int]] = {
            kind: {} for kind in ("session", "model", "tenant", "root")
        }
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._answered_ms: list[int] = []
        self._latest: dict[int, int] = {}  # of a session: its latest request
        self._stop: list[str] = []
        self._chains: list[list[int]] = []

    def _number(self, kind: str, name: Any) -> int:
        known = self._numbers[kind]
        return known.setdefault(name, len(known))

    def add(self, session: Session, number: int, request: Request, at_s: float) -> None:
        """Append *request* of the session *number*."""
        model = self._number("model", request.model)
        tenant = self._number("tenant", self._tenant_of(session.name))
        root = self._number("root", (model, tenant))
        namer = self._namers.get(number)
        if namer is None:
            step = self._tokens // session.id_tokens
            namer = self._namers[number] = _Namer(self._tree, session, step, self._share)
        self._chains.append(namer.name(request, root))
        at_ms = round(at_s * 1000)
        if self._rows:
            at_ms = max(at_ms, self._rows[-1][0] + GAP_MS)
        speaker = self._number("session", session.name + request.agent)
        before = self._latest.get(speaker)
        if before is not None:
            self._answered_ms[before] = min(self._answered_ms[before], at_ms - GAP_MS)
        self._latest[speaker] = len(self._rows)
        self._answered_ms.append(at_ms + round(request.answer_s * 1000))
        self._rows.append((
            at_ms, speaker, model, tenant, request.prompt_tokens, request.answer_tokens,
        ))  # fmt: skip
        self._stop.append(request.stop)

    def stream(self) -> Stream:
        """All that was added."""
        rows = np.array(self._rows, np.int64).reshape(len(self._rows), 6)
        lengths = np.array([len(chain) for chain in self._chains], np.int64)
        roots = np.array(list(self._numbers["root"]), np.int64).reshape(-1, 2)
        of_root = np.array(self._tree.root, np.int64)
        names = {kind: list(known) for kind, known in self._numbers.items()}
        return Stream(
            block_tokens=self._tokens,
            at_ms=rows[:, 0],
            answered_ms=np.maximum(np.array(self._answered_ms, np.int64), rows[:, 0]),
            session=rows[:, 1],
            model=rows[:, 2],
            tenant=rows[:, 3],
            prompt_tokens=rows[:, 4],
            answer_tokens=rows[:, 5],
            stop=self._stop,
            first=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            blocks=np.array([block for chain in self._chains for block in chain], np.int64),
            parent=np.array(self._tree.parent, np.int64),
            depth=np.array(self._tree.depth, np.int64),
            block_model=roots[of_root, 0],
            block_tenant=roots[of_root, 1],
            sessions=names["session"],
            models=names["model"],
            tenants=names["tenant"],
        )
