"""At the start: rows of files as their blocks say, where a rebuild has made the metadata anew.

Else only what a crash left: blocks of files whose rows are gone are removed. Blocks on devices.
"""

import stat
from dataclasses import dataclass, replace
from typing import Final

from twfs.core import listing
from twfs.core.state import Core
from twfs.errors import BadPayload, BlockGone, CorruptMetadata, DeviceError
from twfs.eviction import evicting
from twfs.metadata import filetables
from twfs.metadata.filerows import FILE_KEY, ROOT_INO, FileRow, names_of, row_key, row_of
from twfs.metadata.filetables import DEPTH_MAX
from twfs.metadata.tables import MODEL_KEY, ReadView, WriteView
from twfs.records import Block, BlockKey
from twfs.store import BlockInfo
from twfs.units import Ino, Millis, ModelId, PrefixHash
from twfs.vfs.fileblocks import ROOT_MODE, FileBlocks

ROWS_PER_COMMIT: Final = 2000
LOST_MODE: Final = stat.S_IFDIR | 0o700


def recover(core: Core, blocks: FileBlocks) -> None:
    """Make rows and blocks agree; nothing while there are no files. Blocks."""
    model = blocks.model
    if model is None:
        return
    with core.metadata.read() as view:
        root = filetables.get_row(view, ROOT_INO)
    if root is None:
        _make_rows(core, blocks, model.id)
    _sweep(core, blocks, model.id)


@dataclass(frozen=True, slots=True)
class _Found:
    """A block of some file: its place in it, and the record."""

    index: int
    version: int
    has_row: bool
    key: BlockKey
    block: Block


def _blocks_by_ino(view: ReadView, model: ModelId) -> dict[int, list[_Found]]:
    """All blocks of *model* that may be of files, by inode."""
    found: dict[int, list[_Found]] = {}
    prefix = MODEL_KEY.pack(model)
    for packed, value in view.under("blocks", prefix):
        try:
            block = Block.unpack(value)
        except ValueError as error:
            raise CorruptMetadata(f"the record of a file's block is unreadable: {error}") from error
        if len(block.key) == FILE_KEY.size:
            ino, index, version, has_row = FILE_KEY.unpack(block.key)
            each = _Found(index, version, bool(has_row), BlockKey.unpack(packed), block)
            found.setdefault(ino, []).append(each)
    return found


def _make_rows(core: Core, blocks: FileBlocks, model: ModelId) -> None:
    """Enter the rows that the blocks carry, of files that are whole."""
    with core.metadata.read() as view:
        found = _blocks_by_ino(view, model)
    made: dict[int, tuple[FileRow, int]] = {}  # row and generation
    for ino, parts in found.items():
        row = _newest_row(core, ino, parts)
        if row is not None:
            made[ino] = row
    rows = _rooted({ino: row for ino, (row, _) in made.items()}, blocks.now_ns())
    by_place: dict[tuple[int, bytes], int] = {}
    for ino in sorted(rows, key=lambda ino: made[ino][1] if ino in made else 0):
        if ino != ROOT_INO:
            by_place[rows[ino].parent, rows[ino].name] = ino  # the last to be published has it
    root = rows.pop(int(ROOT_INO))
    wanted = [rows[ino] for ino in by_place.values()]
    for start in range(0, len(wanted), ROWS_PER_COMMIT):
        _enter(core, wanted[start : start + ROWS_PER_COMMIT])
    core.metadata.submit(lambda view: filetables.put_row(view, root)).result()  # last: it is done


def _enter(core: Core, rows: list[FileRow]) -> None:
    def job(view: WriteView) -> None:
        for row in rows:
            filetables.put_row(view, row)
            filetables.put_name(view, row)

    core.metadata.submit(job).result()


def _newest_row(core: Core, ino: int, parts: list[_Found]) -> tuple[FileRow, int] | None:
    """The last row of *ino* that can be read and whose blocks are all there; its generation."""
    there = {each.index for each in parts if not each.version and not each.block.hole}
    for each in sorted(parts, key=lambda each: each.version, reverse=True):
        if not each.has_row or each.block.hole:
            continue
        info = BlockInfo(each.key, each.block, 0, Millis(0), 1)
        try:
            row = row_of(listing.read_block(core, info))
        except (ValueError, BlockGone, BadPayload, DeviceError):
            continue
        whole = row.is_directory or all(index in there for index in range(row.blocks))
        if row.ino == ino and row_key(row) == each.block.key and whole:
            return row, int(each.block.generation)
    return None


def _rooted(rows: dict[int, FileRow], now_ns: int) -> dict[int, FileRow]:
    """*rows*, with a root, and a directory in it for each one that is lost but has something."""
    found = dict(rows)
    found.setdefault(
        int(ROOT_INO),
        FileRow(ROOT_INO, ROOT_INO, b"", ROOT_MODE, 0, 0, mtime_ns=now_ns, ctime_ns=now_ns),
    )
    for row in rows.values():
        above = found.get(int(row.parent))
        if above is None or not above.is_directory:
            found[int(row.parent)] = _lost(row.parent, now_ns)
    for ino, row in list(found.items()):
        if row.is_directory and not _reaches_root(found, row):
            found[ino] = replace(row, parent=ROOT_INO, name=_lost(row.ino, 0).name)
    return found


def _lost(ino: Ino, now_ns: int) -> FileRow:
    """A directory in the place of one whose row is lost."""
    name = f"lost-{ino}".encode()
    return FileRow(ino, ROOT_INO, name, LOST_MODE, 0, 0, mtime_ns=now_ns, ctime_ns=now_ns)


def _reaches_root(rows: dict[int, FileRow], row: FileRow) -> bool:
    for _ in range(DEPTH_MAX):
        if row.ino == ROOT_INO:
            return True
        row = rows[int(row.parent)]
    return False


def _sweep(core: Core, blocks: FileBlocks, model: ModelId) -> None:
    """Drop rows of files that are not whole, and remove blocks that no row needs.

    A crash may leave the latter, a repair both.
    """
    orphans: list[tuple[int, int, int, PrefixHash]] = []
    broken: list[FileRow] = []
    lost: list[FileRow] = []
    with core.metadata.read() as view:
        found = _blocks_by_ino(view, model)
        for row in filetables.all_rows(view):
            parts = found.pop(int(row.ino), [])
            there = {each.block.key for each in parts if not each.block.hole}
            needed = {name.key for name in names_of(row)}
            if row.ino == ROOT_INO and not row.version:
                needed = set()
            if needed <= there:
                orphans += _places(row.ino, [p for p in parts if p.block.key not in needed])
            elif row.is_directory:
                lost.append(row)
            else:
                broken.append(row)
                orphans += _places(row.ino, parts)
    for ino, parts in found.items():
        orphans += _places(ino, parts)
    for start in range(0, len(broken), ROWS_PER_COMMIT):
        _drop(core, broken[start : start + ROWS_PER_COMMIT])
    hashes = [each[3] for each in sorted(orphans)]
    if hashes:
        for future in evicting.remove_chain(core, model, hashes):
            future.result()
    for row in lost:
        blocks.put_row(row, lambda _: None, lambda _: None)


def _places(ino: int, parts: list[_Found]) -> list[tuple[int, int, int, PrefixHash]]:
    """*parts* as they are to be sorted: in chain order."""
    return [(ino, each.index, each.version, each.key.prefix_hash) for each in parts]


def _drop(core: Core, rows: list[FileRow]) -> None:
    def job(view: WriteView) -> None:
        for row in rows:
            filetables.drop(view, row)

    core.metadata.submit(job).result()
