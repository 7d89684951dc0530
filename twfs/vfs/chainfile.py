"""`chain.json`: what names a session's files, and proves them. Written by exports, read by imports.

Also the names of block files. The bytes are deterministic: equal blocks, equal text. Reading treats
the text as hostile. Pure functions, any thread.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final

import msgspec

from twfs.errors import InvalidInput
from twfs.layout import Layout
from twfs.store import BlockInfo, ModelInfo, Retention
from twfs.tenants import EVERYBODY_NAME, Tenants
from twfs.units import DIGEST_BYTES, HASH_BYTES, KEY_BYTES_MAX, PrefixHash

CHAIN_NAME: Final = "chain.json"
NO_TENANTS: Final = Tenants()
CHAIN_FORMAT: Final = "twfs chain 1"
CHAIN_BYTES_MAX: Final = 64 << 20  # about 130,000 lines of 500 bytes
# \Z and not $, which would let a newline follow: a second name for the same thing.
HASH_PATTERN: Final = re.compile(rf"^[0-9a-f]{{{2 * HASH_BYTES}}}\Z")
BLOCK_PATTERN: Final = re.compile(r"^(\d{5,9})(?:\.g(\d{1,3}))?(?:\.s(\d{1,4}))?\.kv\Z", re.ASCII)
DETACHED_PATTERN: Final = re.compile(
    r"^([0-9a-f]{32})(?:\.g(\d{1,3}))?(?:\.s(\d{1,4}))?\.kv\Z", re.ASCII
)
RETENTIONS: Final = tuple(Retention)


def name_suffix(layout: Layout, group: int, shard: int) -> str:
    """What follows the number or hash in a block file's name."""
    of_group = "" if group == layout.spine else f".g{group}"
    of_shard = "" if layout.shards == 1 else f".s{shard}"
    return f"{of_group}{of_shard}.kv"


def block_name(layout: Layout, index: int, group: int, shard: int) -> str:
    """The name of a block's file in its session's directory."""
    return f"{index:05d}{name_suffix(layout, group, shard)}"


def detached_name(layout: Layout, prefix_hash: PrefixHash, group: int, shard: int) -> str:
    """The name of a detached block's file."""
    return f"{prefix_hash.hex()}{name_suffix(layout, group, shard)}"


def parse_block_name(name: str, layout: Layout) -> tuple[int, int, int] | None:
    """Return index, group and shard of a block file's *name*, None if it is no such name."""
    found = BLOCK_PATTERN.match(name)
    if found is None:
        return None
    index, group, shard = _numbers(found, layout)
    return (index, group, shard) if name == block_name(layout, index, group, shard) else None


def parse_detached_name(name: str, layout: Layout) -> tuple[PrefixHash, int, int] | None:
    """Return hash, group and shard of a detached block's *name*, None if it is no such name."""
    found = DETACHED_PATTERN.match(name)
    if found is None:
        return None
    prefix_hash = PrefixHash(bytes.fromhex(found[1]))
    _, group, shard = _numbers(found, layout, base=16)
    good = name == detached_name(layout, prefix_hash, group, shard)
    return (prefix_hash, group, shard) if good else None


def _numbers(found: re.Match[str], layout: Layout, base: int = 10) -> tuple[int, int, int]:
    group = layout.spine if found[2] is None else min(int(found[2]), len(layout.groups))
    shard = 0 if found[3] is None else min(int(found[3]), layout.shards)
    if group == len(layout.groups) or shard == layout.shards:
        group, shard = layout.spine, layout.shards  # no such file: its canonical name differs
    return int(found[1], base), group, shard


def retention_of(rank: int) -> Retention:
    """The class of a record's number; what is unknown counts as pinned."""
    return RETENTIONS[min(rank, len(RETENTIONS) - 1)]


def write_chain(
    model: ModelInfo, head: PrefixHash, infos: Sequence[BlockInfo], tenants: Tenants = NO_TENANTS
) -> bytes:
    """Return the text of chain.json for the blocks *infos* up to *head*; holes are left out.

    It names the tenant, and how many places from the first on are of that one's share group.
    """
    tenant = tenants.name_of(infos[-1].block.charged) if infos else EVERYBODY_NAME
    public = len({info.index for info in infos if tenants.is_group(info.block.tenant)})
    layout = model.layout
    top = {
        "format": CHAIN_FORMAT,
        "model": model.name,
        "epoch": model.epoch,
        "fingerprint": layout.fingerprint.hex(),
        "head": head.hex(),
        "layout": layout.to_dict(),
    }
    if tenant != EVERYBODY_NAME:
        top["tenant"] = tenant
    if public:
        top["public"] = public
    names = {
        (group, shard): name_suffix(layout, group, shard)
        for group in range(len(layout.groups))
        for shard in range(layout.shards)
    }
    lines = []
    # By hand, because a chain has thousands of lines of numbers and hex digits and nothing else.
    for info in infos:
        key, block = info.key, info.block
        if block.hole:
            continue
        sums = block.checksums
        lines.append(
            f'{{"index":{info.index},"group":{key.group},"shard":{key.shard},'
            f'"file":"{info.index:05d}{names[key.group, key.shard]}",'
            f'"hash":"{key.prefix_hash.hex()}","parent":"{block.parent.hex()}",'
            f'"digest":"{block.digest.hex()}","position":{block.position},'
            f'"bytes":{block.payload_bytes},"xxh3":"{sums.xxh3.hex()}",'
            f'"lanes":["{sums.lane_plain:016x}","{sums.lane_weighted:016x}"],'
            f'"class":"{RETENTIONS[min(block.retention, 3)].value}","key":"{block.key.hex()}"}}'
        )
    opening = json.dumps(top, indent=1)[:-2]
    return (opening + ',\n "blocks": [\n' + ",\n".join(lines) + "\n]}\n").encode()


class ChainBlock(msgspec.Struct, frozen=True):
    """One line of chain.json: one block and shard."""

    index: int
    group: int
    shard: int
    file: str
    hash: str
    parent: str
    digest: str
    position: int
    bytes: int
    xxh3: str
    retention: Retention = msgspec.field(name="class", default=Retention.STANDARD)
    key: str = ""


class ChainFile(msgspec.Struct, frozen=True, dict=True):
    """chain.json, as read for an import; `check` before anything in it is believed."""

    format: str
    model: str
    epoch: int
    fingerprint: str
    head: str
    blocks: tuple[ChainBlock, ...]
    tenant: str = EVERYBODY_NAME
    public: Annotated[int, msgspec.Meta(ge=0)] = 0

    @classmethod
    def parse(cls, text: bytes) -> "ChainFile":
        """Read *text*; InvalidInput says where it is not a chain.json."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"chain.json: {error}") from error

    @cached_property
    def files(self) -> Mapping[str, ChainBlock]:
        """The lines by file name."""
        return {block.file: block for block in self.blocks}

    def check(self, model: ModelInfo, head: PrefixHash) -> None:
        """Raise InvalidInput unless this is a whole chain up to *head* for *model* as it is."""
        if self.format != CHAIN_FORMAT:
            raise InvalidInput(f"chain.json has format {self.format!r}, not {CHAIN_FORMAT!r}")
        if self.fingerprint != model.layout.fingerprint.hex():
            raise InvalidInput(
                f"chain.json has layout {self.fingerprint:.16}..., but {model.name} has "
                f"{model.layout.fingerprint.hex():.16}...: import into a model of its layout"
            )
        if self.epoch != model.epoch:
            raise InvalidInput(
                f"chain.json is of epoch {self.epoch}, but {model.name} is at {model.epoch}"
            )
        if self.head != head.hex():
            raise InvalidInput(f"chain.json ends at {self.head}, not at {head.hex()}")
        if not self.blocks or len(self.files) != len(self.blocks):
            raise InvalidInput("chain.json lists no files, or a file twice")
        for block in self.blocks:
            self._check_block(model.layout, block)
        self._check_links(model.layout, head)

    def _check_block(self, layout: Layout, block: ChainBlock) -> None:
        parsed = parse_block_name(block.file, layout)
        if parsed is None or parsed != (block.index, block.group, block.shard):
            raise InvalidInput(f"chain.json gives {block.file!r} to another block")
        if block.bytes != layout.block_bytes(block.group):
            raise InvalidInput(
                f"{block.file} has {block.bytes} bytes in chain.json; "
                f"the layout says {layout.block_bytes(block.group)}"
            )
        lengths: Mapping[str, tuple[Any, int]] = {
            "hash": (block.hash, HASH_BYTES),
            "parent": (block.parent, HASH_BYTES),
            "digest": (block.digest, DIGEST_BYTES),
            "xxh3": (block.xxh3, 16),
        }
        for name, (value, byte_count) in lengths.items():
            if not re.fullmatch(rf"[0-9a-f]{{{2 * byte_count}}}", value):
                raise InvalidInput(f"{block.file}: {name} is not {2 * byte_count} hex digits")
        if not re.fullmatch(r"(?:[0-9a-f]{2})*", block.key) or len(block.key) > 2 * KEY_BYTES_MAX:
            raise InvalidInput(f"{block.file}: key is not up to {KEY_BYTES_MAX} bytes in hex")
        if not 0 <= block.position < 1 << 32:
            raise InvalidInput(f"{block.file}: position {block.position} is none")

    def _check_links(self, layout: Layout, head: PrefixHash) -> None:
        """All files of one index bear one hash, each the parent of the next; the last is *head*."""
        hashes: dict[int, str] = {}
        for block in self.blocks:
            if hashes.setdefault(block.index, block.hash) != block.hash:
                raise InvalidInput(f"{block.file} has another hash than its shards")
        unknown = "00" * HASH_BYTES
        for block in self.blocks:
            before = hashes.get(block.index - 1)
            if before is not None and block.parent not in (before, unknown):
                raise InvalidInput(f"the parent of {block.file} is not the block before it")
        last = max(hashes)
        if hashes[last] != head.hex():
            raise InvalidInput(f"the last block is {hashes[last]}, not {head.hex()}")
        if not any(b.index == last and b.group == layout.spine for b in self.blocks):
            raise InvalidInput("the last block has no file of the first full group")
