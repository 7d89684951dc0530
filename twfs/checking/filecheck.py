"""I27 of FORMAT.md: what the metadata says of files, held against itself. For checker and repair.

One snapshot; nothing here looks at a device. Half a second for 100,000 files.
"""

from collections.abc import Iterator
from typing import Final

from twfs.checking.snapshot import Snapshot
from twfs.checking.subject import Subject
from twfs.errors import CorruptMetadata
from twfs.layout import FILES_NAME
from twfs.metadata.filerows import ROOT_INO, FileRow, names_of
from twfs.metadata.filetables import INO_KEY
from twfs.metadata.tables import ReadView
from twfs.prefix import Root, names_of_keys, root_of
from twfs.records import BLOCK_DTYPE, FLAG_HOLE, BlockKey
from twfs.units import ModelId

FLAGS_OFFSET: Final = int(BLOCK_DTYPE.fields["flags"][1])  # type: ignore[index]


def files_agree(subject: Subject, _: Snapshot) -> Iterator[str]:
    """I27: every file has its name, its directory and all its blocks, and names lead to files."""
    with subject.metadata.read() as view:
        yield from complaints(view)


def complaints(view: ReadView) -> Iterator[str]:
    """What is not as I27 says, a sentence each."""
    rows: dict[int, FileRow] = {}
    for key, value in view.raw("files"):
        try:
            row = FileRow.unpack(value)
            if INO_KEY.pack(row.ino) != key:
                raise ValueError(f"it says that its inode is {row.ino}")
            rows[int(row.ino)] = row
        except ValueError as error:
            yield f"the row of file {key.hex()} cannot be read: {error}"
    known = _model(view)
    for ino, row in rows.items():
        above = rows.get(int(row.parent))
        if above is None or not above.is_directory:
            yield f"file {ino} is in directory {row.parent}, which is not there"
        if known is None:
            yield f"file {ino} is there, but no model of files"
        elif not row.is_directory:
            missing = sum(not _is_there(view, key) for key in _keys(known, row))
            if missing:
                yield f"file {ino} lacks {missing} of its {row.blocks} blocks"
    named = {int(ROOT_INO)}
    for key, value in view.raw("paths"):
        ino = int.from_bytes(value, "big")
        found = rows.get(ino)
        if found is None or INO_KEY.pack(found.parent) + found.name != key:
            yield f"the name {key[8:]!r} leads to inode {ino}, which is not called so"
        else:
            named.add(ino)
    for ino in rows.keys() - named:
        yield f"no name leads to file {ino}"


def _model(view: ReadView) -> tuple[ModelId, Root] | None:
    try:
        number = view.model_id(FILES_NAME)
        record = next((each for each in view.models() if each.id == number), None)
    except CorruptMetadata:  # I2 says so
        return None
    if record is None:
        return None
    return record.id, root_of(record.layout.fingerprint, record.epoch)


def _keys(known: tuple[ModelId, Root], row: FileRow) -> list[bytes]:
    names = names_of_keys(known[1], names_of(row))
    return [BlockKey(known[0], names.hash_at(index)).pack() for index in range(len(names))]


def _is_there(view: ReadView, key: bytes) -> bool:
    value = view.raw_block(key)
    return value is not None and len(value) > FLAGS_OFFSET and not value[FLAGS_OFFSET] & FLAG_HOLE
