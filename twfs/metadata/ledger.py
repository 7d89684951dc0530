"""The transactions: publish, remove, spoil. Functions of a WriteView, and of nothing else.

Each keeps the tables true to each other (children, heads, free, limbo) and returns what changed,
so that the arrays in memory can follow once it is durable. They may be run twice, so they change
nothing but the view.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from twfs.errors import StaleEpoch
from twfs.layout import FILES_NAME, GroupKind, Layout
from twfs.metadata import filetables
from twfs.metadata.filerows import FileRow, carries_row
from twfs.metadata.sessions import NO_PARENT as NO_PARENT  # noqa: PLC0414 - of records
from twfs.metadata.sessions import Covered, Ends, Request
from twfs.metadata.tables import RETIRED, ModelRecord, WriteView
from twfs.records import Block, BlockKey, Extent
from twfs.store import PutOutcome
from twfs.units import ByteCount, Generation, Millis, ModelId, PrefixHash

Follows = Callable[[int, int], bool]  # of a parent's tenant and its child's


@dataclass(slots=True)
class HeadMoves:
    """Slots whose blocks have become heads, and have ceased to be."""

    added: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    ceased: list[PrefixHash] = field(default_factory=list)  # of those dropped, by growth
    fresh: list[PrefixHash] = field(default_factory=list)  # of those added, by growth


@dataclass(frozen=True, slots=True)
class Entered:
    """A block as it was published; *filled* if it took the place of a hole."""

    key: BlockKey
    block: Block
    parent_slot: int | None
    filled: bool


@dataclass(slots=True)
class Published:
    """What a publish changed."""

    outcomes: list[PutOutcome] = field(default_factory=list)
    entered: list[Entered] = field(default_factory=list)
    adopted: list[tuple[int, int]] = field(default_factory=list)  # (child's slot, parent's slot)
    attached: list[int] = field(default_factory=list)
    heads: HeadMoves = field(default_factory=HeadMoves)
    replaced: list[tuple[int, tuple[Extent, ...]]] = field(default_factory=list)  # slot, old place
    also: Any = None  # the result of what else the transaction did
    covered: Covered = field(default_factory=Covered)


@dataclass(slots=True)
class Removed:
    """What a removal changed; *kept* has those that had gained a child meanwhile."""

    blocks: list[tuple[BlockKey, Block]] = field(default_factory=list)
    kept: list[BlockKey] = field(default_factory=list)
    limbo: set[int] = field(default_factory=set)  # slots whose extents a lease may still read
    erase: list[Extent] = field(default_factory=list)  # begin with headers to be overwritten
    heads: HeadMoves = field(default_factory=HeadMoves)
    covered: Covered = field(default_factory=Covered)
    files: list[FileRow] = field(default_factory=list)  # that lack a block now, so they are gone
    rows: set[int] = field(default_factory=set)  # slots of blocks that carried a file's row


def starts_chain(block: Block, layout: Layout) -> bool:
    """Tell whether *block* is the first of its chain: its parent is a root, or nothing."""
    return begins_chain(block.parent, block.key, block.position, layout)


def begins_chain(parent: PrefixHash, key: bytes, position: int, layout: Layout) -> bool:
    """The same of a block with that parent, own key and position."""
    return parent == NO_PARENT or (not key and position == layout.block_tokens)


def required(layout: Layout) -> list[tuple[int, int]]:
    """The (group, shard) pairs that make a block complete: all shards of the full groups."""
    return [
        (group, shard)
        for group, of in enumerate(layout.groups)
        if of.kind is GroupKind.FULL
        for shard in range(layout.shards)
    ]


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """*extents* by place, with those that touch made one."""
    found: list[Extent] = []
    for extent in sorted(extents, key=lambda e: (e.device, e.offset)):
        last = found[-1] if found else None
        if (
            last is not None
            and last.device == extent.device
            and last.offset + last.length == extent.offset
        ):
            found[-1] = replace(last, length=ByteCount(last.length + extent.length))
        else:
            found.append(extent)
    return found


def same_tenant(above: int, below: int) -> bool:
    """Tell whether blocks of these tenants are of one: what may follow what by itself."""
    return above == below


class _Chains:
    """Heads and completeness of one model inside one transaction."""

    def __init__(
        self, view: WriteView, model: ModelRecord, heads: HeadMoves,
        follows: Follows = same_tenant,
    ) -> None:  # fmt: skip
        self.view = view
        self.follows = follows
        self.id = model.id
        self.layout = model.layout
        self.heads = heads
        self.ends = Ends.of(view, model)
        self._required = required(model.layout)
        # Blocks entered in this transaction: the next one's parent need not be read back.
        self.recent: dict[PrefixHash, Block] = {}

    def standing(self, prefix_hash: PrefixHash) -> Block | None:
        """The block that stands for *prefix_hash*: first full group, shard 0."""
        return self.view.block(self.standing_key(prefix_hash))

    def standing_key(self, prefix_hash: PrefixHash) -> BlockKey:
        """Its full name."""
        return BlockKey(self.id, prefix_hash, self.layout.spine, 0)

    def complete(self, prefix_hash: PrefixHash) -> bool:
        """Tell whether every full group and shard of it is there."""
        return all(
            self.view.raw_block(BlockKey(self.id, prefix_hash, group, shard).pack()) is not None
            for group, shard in self._required
        )

    def may_be_head(self, prefix_hash: PrefixHash) -> Block | None:
        """The standing block, if *prefix_hash* is attached, complete and without complete child."""
        block = self.standing(prefix_hash)
        if block is None or block.detached or not self.complete(prefix_hash):
            return None
        children = self.view.children(self.standing_key(prefix_hash))
        return None if any(self.complete(child) for child in children) else block

    def settle(self, prefix_hash: PrefixHash) -> None:
        """After *prefix_hash* gained a block: it may be a head now, and its parent is none."""
        block = self.standing(prefix_hash)
        if block is None or block.detached or not self.complete(prefix_hash):
            return
        children = self.view.children(self.standing_key(prefix_hash))
        if not any(self.complete(child) for child in children) and self.view.add_head(
            self.id, prefix_hash
        ):
            self.heads.added.append(block.slot)
            self.heads.fresh.append(prefix_hash)
            self.ends.look(prefix_hash, block)
        if not starts_chain(block, self.layout) and self.view.drop_head(self.id, block.parent):
            parent = self.standing(block.parent)
            assert parent is not None, block.parent
            self.heads.dropped.append(parent.slot)
            self.heads.ceased.append(block.parent)
            self.ends.look(block.parent, parent)

    def attach(self, key: BlockKey) -> list[tuple[BlockKey, Block]]:
        """Clear the detached flag of all that hangs below *key*; returns those blocks."""
        found = []
        waiting = [key]
        while waiting:
            parent = waiting.pop()
            for child in self.view.children(parent):
                child_key = key.at(child)
                block = self.view.block(child_key)
                if block is not None and block.detached:
                    block = replace(block, detached=False)
                    self.view.put_block(child_key, block)
                    self.recent.pop(child, None)
                    found.append((child_key, block))
                    waiting.append(child_key)
        return found


def publish(
    view: WriteView, model: ModelRecord, candidates: Sequence[tuple[BlockKey, Block]],
    offline: Collection[int] = (), follows: Follows = same_tenant,
    *, asked: Request | None = None,
) -> Published:  # fmt: skip
    """Make *candidates* (of one group and shard) visible, in chain order; one outcome each.

    A name that exists with the same digest is PRESENT and keeps its bytes, one with another is a
    COLLISION; but one on a device of *offline* is replaced as if it were a hole, and its old place
    goes to limbo. *follows* tells whether a block of a tenant may hang below one of another. What
    would make the tree untrue (itself its parent, a position not behind its
    parent's) is FAILED. Sessions without id go on with their chains, and that of *asked* moves to
    the last of its blocks, but for those of this put that came to nothing. StaleEpoch if the epoch
    has ended since the put began.
    """
    if view.model_id(model.name) != model.id:
        raise StaleEpoch(
            f"epoch {model.epoch} of model {model.name} ended during the put: open the model again"
        )
    done = Published()
    chains = _Chains(view, model, done.heads, follows)
    touched: list[PrefixHash] = []
    for key, block in candidates:
        outcome = _enter(chains, key, block, done, touched, offline)
        done.outcomes.append(outcome)
    for run in merged(
        extent for entered in done.entered for extent in entered.block.extents
    ):  # fmt: skip
        view.take_free(run)
    parent_of = {
        entered.key.prefix_hash: entered.block.parent
        for entered in done.entered
        if not entered.filled  # a filled hole may be a head
    }
    inner = set(parent_of.values())
    simple = len(required(model.layout)) == 1
    for prefix_hash in reversed(touched):
        # Where one block makes complete, the middle of a chain of this batch has nothing to settle.
        if not (simple and prefix_hash in inner and parent_of.get(prefix_hash) in parent_of):
            chains.settle(prefix_hash)
    for ceased in done.heads.ceased:
        chains.ends.grow(ceased, done.heads.fresh)
    if asked is not None:
        good = {PutOutcome.PUBLISHED, PutOutcome.PRESENT}
        bad = {
            key.prefix_hash
            for (key, _), outcome in zip(candidates, done.outcomes, strict=True)
            if outcome not in good
        }
        reach = list(takewhile(lambda head: head not in bad, asked.reach))
        chains.ends.advance(replace(asked, reach=reach))
    done.covered.note(chains.ends)
    return done


def _enter(  # noqa: PLR0917 - the state of one publish
    chains: _Chains, key: BlockKey, block: Block, done: Published, touched: list[PrefixHash],
    offline: Collection[int],
) -> PutOutcome:  # fmt: skip
    """Enter one block, or say why not."""
    view, layout = chains.view, chains.layout
    existing = view.block(key)
    if existing is not None:
        return _fill(view, key, block, existing, done, offline)
    start = starts_chain(block, layout)
    parent_key = key.at(block.parent)
    parent = None if start else chains.recent.get(block.parent) or view.block(parent_key)
    children = view.children(key)
    if _mixes_tenants(chains, key, block, parent, children):
        return PutOutcome.COLLISION
    if not _fits(chains, key, block, parent, children):
        return PutOutcome.FAILED
    # A window or state group has no whole chains: nothing is missing before one of its blocks.
    sparse = layout.groups[key.group].kind is not GroupKind.FULL
    if not start and not sparse and (parent is None or parent.detached):
        block = replace(block, detached=True)
    view.put_block(key, block)
    chains.recent[key.prefix_hash] = block
    if not start:
        view.add_child(parent_key, key.prefix_hash)
    done.entered.append(Entered(key, block, None if parent is None else parent.slot, filled=False))
    touched.append(key.prefix_hash)
    for child in children:
        below = view.block(key.at(child))
        if below is not None:
            done.adopted.append((below.slot, block.slot))
    if children and not block.detached:
        for below_key, below in chains.attach(key):
            done.attached.append(below.slot)
            touched.append(below_key.prefix_hash)
    return PutOutcome.PUBLISHED


def _fill(  # noqa: PLR0917 - as above
    view: WriteView, key: BlockKey, block: Block, existing: Block, done: Published,
    offline: Collection[int],
) -> PutOutcome:  # fmt: skip
    """Enter a block in the place of a hole, or of what an offline device holds; or say why not."""
    if not same_life(existing, block):
        return PutOutcome.COLLISION
    if not existing.hole:
        if not any(extent.device in offline for extent in existing.extents):
            return PutOutcome.PRESENT
        done.replaced.append((existing.slot, existing.extents))
        for extent in existing.extents:
            view.add_limbo(extent)
    kept = replace(
        block, slot=existing.slot, detached=existing.detached,
        parent=existing.parent, position=existing.position,
        retention=max(block.retention, existing.retention),
    )  # fmt: skip
    view.put_block(key, kept)
    done.entered.append(Entered(key, kept, None, filled=True))
    return PutOutcome.PUBLISHED


def same_life(existing: Block, block: Block) -> bool:
    """Tell whether *block* is what has its name already: of the same tenant, digest and own key."""
    return (existing.digest, existing.key, existing.tenant) == (
        block.digest, block.key, block.tenant,
    )  # fmt: skip


def _mixes_tenants(
    chains: _Chains, key: BlockKey, block: Block, parent: Block | None, children: list[PrefixHash]
) -> bool:
    """Tell whether *block* would hang below or above another tenant's: a chain is of one tenant.

    But it may begin with blocks of the tenant's share group. Salts keep names apart, so only a
    forged name comes to this.
    """
    if parent is not None and not chains.follows(parent.tenant, block.tenant):
        return True
    beside = [chains.view.block(key.at(child)) for child in children]
    return any(
        below is not None and not chains.follows(block.tenant, below.tenant) for below in beside
    )


def _fits(
    chains: _Chains, key: BlockKey, block: Block, parent: Block | None, children: list[PrefixHash]
) -> bool:
    """Tell whether *block* can hang below *parent* and above *children* in a tree."""
    view = chains.view
    if block.parent == key.prefix_hash:
        return False
    if parent is not None and block.position and block.position <= parent.position:
        return False
    for child in children:
        below = view.block(key.at(child))
        if below is not None and below.position and below.position <= block.position:
            return False
    above = parent
    while children and above is not None:  # a ring needs a child and a way up to it
        if starts_chain(above, chains.layout):
            break
        if above.parent == key.prefix_hash:
            return False
        above = view.block(key.at(above.parent))
    return True


def remove(
    view: WriteView, model: ModelRecord, keys: Sequence[BlockKey], *, to_limbo: frozenset[int],
    over: bool = False,
) -> Removed:  # fmt: skip
    """Take out blocks, those deeper in a chain first.

    The sessions that end there go up their chains; if *over*, as somebody wants them gone, they
    end. The extents of slots in *to_limbo* wait in limbo, all others are free. A block that has a
    child is kept: its child was published after it was chosen.
    """
    done = Removed()
    chains = _Chains(view, model, done.heads)
    freed: list[Extent] = []
    for key in keys:
        block = view.block(key)
        if block is None or view.children(key):
            done.kept.append(key)
            continue
        standing = chains.standing(key.prefix_hash)
        if standing is not None and key == chains.standing_key(key.prefix_hash):
            chains.ends.lift(key.prefix_hash, standing, over=over)
        view.delete_block(key)
        if model.name == FILES_NAME:
            row = filetables.lose(view, block.key)
            done.files += [] if row is None else [row]
            if carries_row(block.key) and block.extents:
                done.rows.add(block.slot)
        # Without a block of a window or state group it is still complete, and so still a head.
        if not chains.complete(key.prefix_hash) and view.drop_head(key.model, key.prefix_hash):
            assert standing is not None, key
            done.heads.dropped.append(standing.slot)
            chains.ends.look(key.prefix_hash, standing)
        if not starts_chain(block, model.layout):
            view.drop_child(key.at(block.parent), key.prefix_hash)
            above = chains.may_be_head(block.parent)
            if above is not None and view.add_head(key.model, block.parent):
                done.heads.added.append(above.slot)
                chains.ends.look(block.parent, above)
        if block.slot in to_limbo:
            done.limbo.add(block.slot)
            for extent in block.extents:
                view.add_limbo(extent)
        else:
            freed.extend(block.extents)
        done.blocks.append((key, block))
    for run in merged(freed):
        view.add_free(run)
    chains.ends.land()
    done.covered.note(chains.ends)
    return done


def free_limbo(view: WriteView, extents: Sequence[Extent]) -> None:
    """Give the extents of a removed block back, its last lease having ended."""
    for extent in extents:
        view.drop_limbo(extent)
        view.add_free(extent)


def empty_limbo(view: WriteView) -> list[Extent]:
    """Free all of limbo but what is retired: at start, no lease is left."""
    extents = list(view.leased_limbo())
    free_limbo(view, extents)
    return extents


@dataclass(frozen=True, slots=True)
class Move:
    """A block that has been copied to *extents* under *generation*."""

    key: BlockKey
    before: Block
    generation: Generation
    extents: tuple[Extent, ...]


def move(view: WriteView, moves: Sequence[Move]) -> list[bool]:
    """Let blocks lie where they were copied to; tells which did not change meanwhile.

    Their old places are in limbo until nobody reads them; see Core.leave_places.
    """
    done = []
    taken: list[Extent] = []
    for each in moves:
        block = view.block(each.key)
        same = block is not None and block.generation == each.before.generation and not block.hole
        done.append(same)
        if block is not None and same:
            moved = replace(block, generation=each.generation, extents=each.extents)
            view.put_block(each.key, moved)
            taken += each.extents
            for extent in block.extents:
                view.add_limbo(extent)
    for run in merged(taken):
        view.take_free(run)
    return done


def spoil(view: WriteView, key: BlockKey, generation: int) -> tuple[Block, FileRow | None] | None:
    """Make a hole of the block whose bytes were lost; its record before, None if it has changed.

    The extents are not given back: bytes were lost there, so they are retired for good. With it
    comes the file that is gone because of that.
    """
    block = view.block(key)
    if block is None or block.generation != generation or block.hole:
        return None
    view.put_block(key, replace(block, hole=True, extents=()))
    for extent in block.extents:
        view.add_limbo(extent, RETIRED)
    of_files = bool(block.key) and view.model_id(FILES_NAME) == key.model
    return block, filetables.lose(view, block.key) if of_files else None


def charge_to(view: WriteView, passed: Sequence[tuple[BlockKey, int, int]]) -> list[bool]:
    """Let others be charged for blocks of share groups: (key, who was, who is now) each.

    Tells of which: those that are gone, or charged to another meanwhile, stay as they are.
    """
    done = []
    for key, before, now in passed:
        block = view.block(key)
        same = block is not None and block.charged == before
        done.append(same)
        if block is not None and same:
            view.put_block(key, replace(block, payer=0 if now == block.tenant else now))
    return done


def next_model(
    view: WriteView, name: str, layout: Layout, created_ms: Millis, *, anew: bool
) -> ModelRecord:
    """Enter the model *name*, or with *anew* its next epoch; one that is there stays otherwise."""
    old_id = view.model_id(name)
    old = next((record for record in view.models() if record.id == old_id), None)
    if old is not None and not anew:
        return old
    number = ModelId(view.counter("model"))
    model = ModelRecord(number, name, 0 if old is None else old.epoch + 1, layout, created_ms)
    view.set_counter("model", number + 1)
    view.put_model(model)
    return model
