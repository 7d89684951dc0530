"""What the mounted tree is: names, inode numbers, attributes, contents, removed names, imports.

No FUSE here: the mount only translates. Everything is asked of a Namespace; what is kept is a
bounded number of chains and the names that were unlinked. For one thread (the event loop), but for
`read_chain`, which may be called from any.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from twfs.errors import BlockGone, NoSuchBlock, NotEmpty
from twfs.records import BlockKey
from twfs.store import BlockInfo, ModelInfo, Namespace, iterate_heads
from twfs.units import Ino, Millis, ModelId, PrefixHash
from twfs.vfs.chainfile import (
    CHAIN_NAME,
    HASH_PATTERN,
    block_name,
    detached_name,
    parse_block_name,
    parse_detached_name,
    write_chain,
)
from twfs.vfs.describing import describe_block, describe_session, metrics, pretty
from twfs.vfs.importing import Importer, Pending, PendingFile, PendingState
from twfs.vfs.nodes import (
    CHAIN_INOS,
    CONTROL,
    CONTROL_NAME,
    DETACHED_NAME,
    FILES,
    LAYOUTS,
    METRICS,
    MODEL_INOS,
    ROOT,
    SECOND,
    SESSION_INOS,
    STATISTICS,
    Attributes,
    BlockFile,
    Chain,
    ChainText,
    ControlFile,
    DetachedDirectory,
    ModelDirectory,
    Node,
    Row,
    Rows,
    SessionDirectory,
    attributes_of,
    directory_attributes,
    layout_file,
)

CHAINS_BLOCKS_MAX: Final = 1 << 17  # blocks of all chains kept: about 250 MiB
TEXTS_BYTES_MAX: Final = 64 << 20  # chain.json kept for the stat, open, read that follow each other
MODELS_SECONDS: Final = 1.0  # how late a new epoch may be seen
HIDDEN_MAX: Final = 1 << 20  # names unlinked in directories that are still there
LONG_CHAIN: Final = 512  # blocks; reading a longer chain takes milliseconds: not in the event loop


class Tree:
    """See the module's docstring."""

    def __init__(
        self, namespace: Namespace, importer: Importer,
        mount_statistics: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:  # fmt: skip
        self._namespace = namespace
        self._importer = importer
        self._mount_statistics = mount_statistics
        self._models: dict[ModelId, ModelInfo] = {}
        self._models_at: int | None = None
        self._models_seen_s = 0.0
        self._chains: OrderedDict[tuple[ModelId, PrefixHash], Chain] = OrderedDict()
        self._hidden: OrderedDict[Ino, set[str]] = OrderedDict()
        self._hidden_count = 0
        self._chains_read = 0
        self._started_ms = Millis(time.time_ns() // 1_000_000)

    def statistics(self) -> dict[str, Any]:
        """What the tree keeps, and how often it read a chain."""
        return {
            "chains": len(self._chains),
            "chain_blocks": sum(len(chain.infos) for chain in self._chains.values()),
            "chain_reads": self._chains_read,
            "hidden_names": self._hidden_count,
        }

    # Who sees what

    def check_seen(self, node: Node, uid: int) -> None:
        """Raise NoSuchBlock if *node* is not for *uid* to see, as if it were not there."""
        tenants, node = self._namespace.tenants(), self.resolve(node)
        if uid in tenants.operators:
            return
        seen = True
        if isinstance(node, Pending | PendingFile):
            seen = uid == (node.pending if isinstance(node, PendingFile) else node).uid
        elif isinstance(node, SessionDirectory | ChainText | BlockFile):
            seen = tenants.may_see(uid, self._info(node).block.tenant)
        if not seen:
            raise NoSuchBlock(f"not there for uid {uid}")

    def _info(self, node: SessionDirectory | ChainText | BlockFile) -> BlockInfo:
        """The block that *node* is, or ends with; BlockGone."""
        if isinstance(node, BlockFile):
            return self.block(node)
        return self.session_block(node.session if isinstance(node, ChainText) else node)

    def _owner(self, info: BlockInfo) -> int | None:
        return self._namespace.tenants().owner_of(info.block.charged)

    def _write(self, model: ModelInfo, head: PrefixHash, infos: list[BlockInfo]) -> bytes:
        return write_chain(model, head, infos, self._namespace.tenants())

    # Models

    def models(self) -> dict[ModelId, ModelInfo]:
        """All models in their present epoch. Counts in them are as old as the last change."""
        changes = self._namespace.changes()
        if changes != self._models_at:
            self._models = {info.id: info for info in self._namespace.models()}
            self._models_at = changes
        self._models_seen_s = time.monotonic()
        return self._models

    def model(self, model: ModelId) -> ModelInfo:
        """One model, as of a second ago; BlockGone if it is at another epoch now."""
        # The store counts all its blocks to answer this: not for every request while puts go on.
        recent = time.monotonic() - self._models_seen_s < MODELS_SECONDS
        info = self._models.get(model) if recent else None
        info = info or self.models().get(model)
        if info is None:
            raise BlockGone(f"model {model} has opened a new epoch")
        return info

    # Chains

    def session_key(self, model: ModelId, prefix_hash: PrefixHash) -> BlockKey:
        """The name of the block that stands for a session directory."""
        return BlockKey(model, prefix_hash, self.model(model).layout.spine, 0)

    def is_head(self, model: ModelId, prefix_hash: PrefixHash) -> bool:
        """Tell whether `ls` lists it."""
        number = int.from_bytes(prefix_hash, "big")
        after = PrefixHash((number - 1).to_bytes(16, "big")) if number else None
        return self._namespace.heads(model, after=after, limit=1) == [prefix_hash]

    def kept_chain(self, session: SessionDirectory, *, fresh: bool = True) -> Chain | None:
        """The chain of *session* if it is kept and, where *fresh*, nothing has changed since."""
        chain = self._chains.get((session.model, session.head))
        if chain is None or (fresh and chain.changes != self._namespace.changes()):
            return None
        self._chains.move_to_end((session.model, session.head))
        return chain

    def is_long(self, session: SessionDirectory) -> bool:
        """Tell whether reading the chain belongs in a worker thread; NoSuchBlock."""
        info = self._namespace.block_info(self.session_key(session.model, session.head))
        layout = self.model(session.model).layout
        return info.index * len(layout.groups) * layout.shards > LONG_CHAIN

    def read_chain(self, model: ModelInfo, head: PrefixHash) -> Chain:
        """Read a chain anew, with its text; NoSuchBlock. In any thread; `keep` what it returns."""
        changes = self._namespace.changes()
        chain = Chain(self._namespace.chain_of(model.id, head), changes)
        chain.text = self._write(model, head, chain.infos)
        return chain

    def keep(self, session: SessionDirectory, chain: Chain) -> Chain:
        """Keep *chain* among the last used ones."""
        self._chains_read += 1
        self._chains[session.model, session.head] = chain
        self._chains.move_to_end((session.model, session.head))
        held = sum(len(kept.infos) for kept in self._chains.values())
        texts = sum(len(kept.text or b"") for kept in self._chains.values())
        while (held > CHAINS_BLOCKS_MAX or texts > TEXTS_BYTES_MAX) and len(self._chains) > 1:
            _, old = self._chains.popitem(last=False)
            held -= len(old.infos)
            texts -= len(old.text or b"")
        return chain

    def chain(self, session: SessionDirectory) -> Chain:
        """The chain of *session*, as it is now; NoSuchBlock."""
        kept = self.kept_chain(session)
        if kept is not None:
            return kept
        changes = self._namespace.changes()
        infos = self._namespace.chain_of(session.model, session.head)
        return self.keep(session, Chain(infos, changes))

    def chain_text(self, session: SessionDirectory, chain: Chain | None = None) -> bytes:
        """The content of its chain.json, as of *chain* or as it is now."""
        chain = chain or self.chain(session)
        if chain.text is None:
            chain.text = self._write(self.model(session.model), session.head, chain.infos)
        return chain.text

    # Names

    def lookup(self, directory: Node, name: str, uid: int = 0) -> Node:
        """Return what *name* is in *directory*; NoSuchBlock if it is not there for *uid*."""
        directory = self.resolve(directory)
        self.check_seen(directory, uid)
        node = self._lookup(directory, name)
        if not isinstance(directory, SessionDirectory):  # what is in one is of its tenant
            self.check_seen(node, uid)
        return node

    def _lookup(self, directory: Node, name: str) -> Node:
        if isinstance(directory, ModelDirectory):
            return self._lookup_in_model(directory.model, name)
        if isinstance(directory, SessionDirectory):
            return self._lookup_in_session(directory, name)
        if isinstance(directory, Pending):
            file = directory.files.get(name)
            if file is not None:
                return file
        elif isinstance(directory, DetachedDirectory):
            return self._lookup_detached(directory, name)
        else:
            for here, node in self._fixed_names(directory):
                if here == name:
                    return node
        raise NoSuchBlock(f"no {name!r} here")

    def _lookup_in_model(self, model: ModelId, name: str) -> Node:
        if name == DETACHED_NAME:
            return self.detached_directory(model)
        if not HASH_PATTERN.match(name):
            raise NoSuchBlock(f"{name!r} is no prefix hash of 32 hex digits")
        prefix_hash = PrefixHash(bytes.fromhex(name))
        return self._importer.pending(model, prefix_hash) or self.session(model, prefix_hash)

    def session(self, model: ModelId, prefix_hash: PrefixHash) -> SessionDirectory:
        """The directory of any prefix whose whole chain is there; NoSuchBlock."""
        info = self._namespace.block_info(self.session_key(model, prefix_hash))
        session = SessionDirectory(model, prefix_hash, Ino(SESSION_INOS | info.block.ino))
        if info.block.detached:
            raise NoSuchBlock(f"{prefix_hash.hex()} is detached: see {DETACHED_NAME}/")
        return session

    def _lookup_in_session(self, session: SessionDirectory, name: str) -> Node:
        if name in self._hidden.get(session.ino, ()):
            raise NoSuchBlock(f"{name!r} was removed")
        if name == CHAIN_NAME:
            return self.chain_file(session)
        layout = self.model(session.model).layout
        parsed = parse_block_name(name, layout)
        if parsed is not None:
            for fresh in (False, True):
                chain = self.kept_chain(session, fresh=False) if not fresh else self.chain(session)
                place = None if chain is None else chain.places.get(parsed)
                if chain is None or place is None:
                    continue
                info = chain.infos[place]
                now = fresh or chain.changes == self._namespace.changes()
                if not info.block.hole and (now or self.is_life(info.key, info.block.ino)):
                    return BlockFile(info.key, info.block.ino, session, place)
        raise NoSuchBlock(f"no {name!r} in {session.head.hex()}")

    def is_life(self, key: BlockKey, ino: Ino) -> bool:
        """Tell whether the block *key* is there, and is the one that had *ino*."""
        try:
            return self._namespace.block_info(key).block.ino == ino
        except NoSuchBlock:
            return False

    def _lookup_detached(self, directory: DetachedDirectory, name: str) -> Node:
        parsed = parse_detached_name(name, self.model(directory.model).layout)
        if parsed is not None:
            key = BlockKey(directory.model, *parsed)
            block = self._namespace.block_info(key).block
            if block.detached:
                return BlockFile(key, block.ino)
        raise NoSuchBlock(f"no detached block {name!r}")

    def chain_file(self, session: SessionDirectory) -> ChainText:
        """Its chain.json."""
        return ChainText(session, Ino(CHAIN_INOS | (session.ino & ~SESSION_INOS)))

    def model_directory(self, model: ModelId) -> ModelDirectory:
        """The directory of *model*."""
        return ModelDirectory(model, Ino(MODEL_INOS | model))

    def detached_directory(self, model: ModelId) -> DetachedDirectory:
        """Its `detached`."""
        return DetachedDirectory(model, Ino(MODEL_INOS | SECOND | model))

    def resolve(self, node: Node) -> Node:
        """What *node* is now: a finished import is the session that it became."""
        if isinstance(node, Pending) and node.state is PendingState.PUBLISHED:
            return self.session(node.model.id, node.head)
        if isinstance(node, PendingFile) and node.pending.state is PendingState.PUBLISHED:
            return self.lookup(node.pending, node.name)
        return node

    # Listings

    def rows(self, directory: Node, chain: Chain | None = None, *, uid: int = 0) -> Rows:
        """The names of *directory* that *uid* may see, for one opendir; NoSuchBlock, BlockGone.

        *chain* is that of a session, if it has just been read.
        """
        directory = self.resolve(directory)
        self.check_seen(directory, uid)
        if isinstance(directory, SessionDirectory):
            return self._session_rows(directory, chain or self.chain(directory))
        if isinstance(directory, ModelDirectory):
            return self._model_rows(directory.model, uid)
        if isinstance(directory, Pending):
            files = list(directory.files.values())
            return Rows(iter(files), lambda file: self._row(file.name, file))
        if isinstance(directory, DetachedDirectory):
            layout = self.model(directory.model).layout
            keys = self._namespace.detached(directory.model)
            return Rows(
                iter(keys),
                lambda key: self._row_by(
                    directory, detached_name(layout, key.prefix_hash, key.group, key.shard), uid
                ),
            )
        return Rows(iter(self._fixed_names(directory)), lambda pair: self._row(*pair))

    def _fixed_names(self, directory: Node) -> list[tuple[str, Node]]:
        """The names in the root and under `.twfs`."""
        models = self.models()
        if directory == ROOT:
            shown = [(info.name, self.model_directory(model)) for model, info in models.items()]
            return [(CONTROL_NAME, CONTROL), (FILES.name, FILES), *shown]
        if directory == CONTROL:
            return [(node.name, node) for node in (STATISTICS, METRICS, LAYOUTS)]
        if directory == LAYOUTS:
            return [
                (f"{info.name}.json", layout_file(model, info)) for model, info in models.items()
            ]
        return []

    def _row(self, name: str, node: Node) -> Row | None:
        try:
            found = self.attributes(node)
        except (NoSuchBlock, BlockGone):
            return None  # evicted since the directory was opened
        return Row(name, node, found) if found.ino == node.ino else None  # published just now

    def _row_by(self, directory: Node, name: str, uid: int) -> Row | None:
        try:
            return self._row(name, self.lookup(directory, name, uid))
        except (NoSuchBlock, BlockGone):
            return None

    def _model_rows(self, model: ModelId, uid: int) -> Rows:
        directory = self.model_directory(model)

        def names() -> Iterator[str]:
            yield DETACHED_NAME
            pending = {each.head for each in self._importer.pendings(model)}
            yield from sorted(head.hex() for head in pending)
            for head in iterate_heads(self._namespace, model):
                if head not in pending:
                    yield head.hex()

        return Rows(names(), lambda name: self._row_by(directory, name, uid))

    def _session_rows(self, session: SessionDirectory, chain: Chain) -> Rows:
        layout = self.model(session.model).layout

        def make(place: int | None) -> Row | None:
            hidden = self._hidden.get(session.ino, ())
            if place is None:
                if CHAIN_NAME in hidden:
                    return None
                try:
                    attributes = self._text_attributes(session, chain)
                except BlockGone:
                    return None
                return Row(CHAIN_NAME, self.chain_file(session), attributes)
            info = chain.infos[place]
            name = block_name(layout, info.index, info.key.group, info.key.shard)
            if info.block.hole or name in hidden:
                return None
            node = BlockFile(info.key, info.block.ino, session, place)
            return Row(name, node, attributes_of(info, self._owner(info)))

        # chain.json first: an import that reads it first verifies each file as it comes.
        return Rows(iter([None, *range(len(chain.infos))]), make)

    def _text_attributes(self, session: SessionDirectory, chain: Chain | None = None) -> Attributes:
        info = self.session_block(session)
        published, size = info.block.published_ms, len(self.chain_text(session, chain))
        ino, owner = self.chain_file(session).ino, self._owner(info)
        return Attributes(ino, 1, size, 0, published, published, owner)

    # Attributes and contents

    def attributes(self, node: Node) -> Attributes:
        """What stat shows of *node* now; NoSuchBlock, or BlockGone if its life is over."""
        node = self.resolve(node)
        if isinstance(node, BlockFile | SessionDirectory):
            info = self._info(node)
            if isinstance(node, BlockFile):
                return attributes_of(info, self._owner(info))
            return directory_attributes(node.ino, info, self._owner(info))
        if isinstance(node, ChainText):
            return self._text_attributes(node.session)
        if isinstance(node, ControlFile):
            now = Millis(time.time_ns() // 1_000_000)
            return Attributes(node.ino, 1, len(self.content(node)), 0, now, now)
        size, when, owner = 0, self._started_ms, None
        if isinstance(node, PendingFile):
            size, when, owner = node.size, node.changed_ms, node.pending.uid
        elif isinstance(node, Pending):
            when, owner = node.changed_ms, node.uid
        elif isinstance(node, ModelDirectory | DetachedDirectory):
            when = self.model(node.model).created_ms
        return Attributes(node.ino, 1, size, 0, when, when, owner)

    def block(self, file: BlockFile) -> BlockInfo:
        """The block of *file* as it is now; BlockGone if another life, or none, has its name."""
        if file.session is not None:
            chain = self.kept_chain(file.session)
            if chain is not None and file.place < len(chain.infos):
                info = chain.infos[file.place]
                if info.block.ino == file.ino:
                    return info
        return self._life(file.key, file.ino)

    def session_block(self, session: SessionDirectory) -> BlockInfo:
        """The block that stands for *session*; BlockGone if it is another by now."""
        ino = Ino(session.ino & ~SESSION_INOS)
        return self._life(self.session_key(session.model, session.head), ino)

    def _life(self, key: BlockKey, ino: Ino) -> BlockInfo:
        try:
            info = self._namespace.block_info(key)
        except NoSuchBlock as error:
            raise BlockGone(f"block {key.prefix_hash.hex()} has been evicted") from error
        if info.block.ino != ino:
            raise BlockGone(f"block {key.prefix_hash.hex()} has been evicted and stored again")
        return info

    def next_block(self, file: BlockFile) -> BlockFile | None:
        """The block whose file follows in the same directory, if its chain is kept."""
        chain = None if file.session is None else self.kept_chain(file.session, fresh=False)
        if chain is None or file.place + 1 >= len(chain.infos):
            return None
        info = chain.infos[file.place + 1]
        return BlockFile(info.key, info.block.ino, file.session, file.place + 1)

    def content(self, node: ControlFile | ChainText) -> bytes:
        """The whole text of a file that is made when it is looked at."""
        if isinstance(node, ChainText):
            return self.chain_text(node.session)
        if node.model is not None:
            layout = self.model(node.model).layout
            return pretty({"fingerprint": layout.fingerprint.hex(), "layout": layout.to_dict()})
        figures = dict(self._namespace.statistics())
        figures["tree"] = self.statistics()
        figures["imports"] = self._importer.statistics()
        figures["mount"] = dict(self._mount_statistics())
        return pretty(figures) if node == STATISTICS else metrics(figures)

    def described(self, node: Node) -> dict[str, bytes]:
        """The extended attributes of *node*, by full name."""
        node, named = self.resolve(node), self._namespace.tenants().name_of
        if not isinstance(node, BlockFile | SessionDirectory):
            return {}
        about = (self.model((info := self._info(node)).key.model), info, named(info.block.tenant))
        if isinstance(node, SessionDirectory):
            return describe_session(*about)
        return describe_block(*about, self._namespace.device_paths())

    # Removal

    def hide(self, session: SessionDirectory, name: str) -> None:
        """Take *name* out of this directory: not out of others, and not out of the store."""
        self._lookup_in_session(session, name)
        self._hidden.setdefault(session.ino, set()).add(name)
        self._hidden_count += 1
        while self._hidden_count > HIDDEN_MAX:  # names of the oldest half-removed directory return
            _, names = self._hidden.popitem(last=False)
            self._hidden_count -= len(names)

    def show(self, session: SessionDirectory) -> None:
        """Let the names unlinked in *session* be listed again, if it still is there."""
        self._hidden_count -= len(self._hidden.pop(session.ino, ()))

    def check_empty(self, session: SessionDirectory) -> None:
        """Raise NotEmpty while *session* lists names."""
        for _, row in self._session_rows(session, self.chain(session)).since(0):
            raise NotEmpty(f"{session.head.hex()} still has {row.name}")

    def changed_class(self, model: ModelId) -> None:
        """Forget the chains of *model*: the classes in them have changed."""
        for key in [key for key in self._chains if key[0] == model]:
            del self._chains[key]
