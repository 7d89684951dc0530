"""Files written and read through the library, as the mount does it."""

import socket

from twfs.filerows import FileRow
from twfs.files import Files
from twfs.units import Ino

WRITER = 4711  # stands for a process


def make_file(
    files: Files, parent: int, name: bytes, data: bytes, *, mode: int = 0o644, uid: int = 0
) -> Ino:
    """Write a whole file and publish it; its inode."""
    draft = files.create(parent, name, mode=mode, uid=uid, gid=0, writer=WRITER)
    files.open_draft(draft, writing=True)
    for at in range(0, len(data), 1 << 20):
        if not draft.write_quickly(at, data[at : at + (1 << 20)]):
            draft.write(at, data[at : at + (1 << 20)])
    assert files.close_draft(draft, writing=True)
    files.publish(draft)
    return draft.ino


def content(files: Files, row: FileRow) -> bytes:
    """The verified bytes of a published file."""
    return b"".join(bytes(files.blocks.read(row, index)) for index in range(row.blocks))


def tree_of(files: Files, parent: int = 0, above: bytes = b"") -> dict[bytes, bytes | None]:
    """All paths below *parent* with their bytes; None for a directory."""
    found: dict[bytes, bytes | None] = {}
    for name, ino in files.names(parent):
        path, row = above + b"/" + name, files.row(ino)
        found[path] = None if row.is_directory else content(files, row)
        if row.is_directory:
            found |= tree_of(files, ino, path)
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port
