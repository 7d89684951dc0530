"""A random load of mounted files, recorded for power cuts, and what must be there after a cut.

Every change of the tree is one step, between two marks in the log. It has happened whole or not at
all, and certainly when it has returned: so after a cut the tree is just that before or behind the
step under way; where several files are closed at once, any of them may be there. Pieces are made
small, so that a file has several.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Final

import pytest

from support.filing import WRITER, make_file, tree_of
from support.powercut import Marked, Recorder
from support.warehouses import open_warehouse
from twfs.metadata import filerows
from twfs.store import Durability
from twfs.units import Ino
from twfs.vfs import drafts
from twfs.vfs.drafts import Draft
from twfs.vfs.files import Files

PIECE_BYTES: Final = 16 << 10
SIZES: Final = (0, 100, 4096, 5000, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 777)
DIRECTORIES: Final = (b"/d", b"/e")
# So few that none is evicted, and so often written that all of the space is used again.
PATHS: Final = (b"/a", b"/b", b"/c", b"/d/a", b"/d/b", b"/e/a")
AT_ONCE: Final = 3
BEGUN_MAX: Final = 2  # files that are being written, and are not closed

Tree = dict[bytes, bytes | None]  # the bytes under each path; None for a directory
Made = tuple[list[Tree], Callable[[], object]]  # the trees on the way and behind; what makes it so


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Let files have several pieces on small devices."""
    for module in (filerows, drafts):
        patch.setattr(module, "PIECE_BYTES", PIECE_BYTES)


@dataclass(slots=True)
class FilesLoad:
    """One warehouse whose files change."""

    directory: Path
    recorder: Recorder
    durability: Durability
    steps: list[list[Tree]] = field(default_factory=list)  # of each: before, on the way, behind
    tree: Tree = field(default_factory=dict)
    begun: list[Draft] = field(default_factory=list)

    def run(self, chance: random.Random, steps: int) -> None:
        """Do *steps* things; the tree is as it should be then, and the checker finds nothing."""
        with open_warehouse(self.directory, durability=self.durability) as warehouse:
            for _ in range(steps):
                (kind,) = chance.choices(
                    (self._write, self._several, self._rename, self._unlink, self._mkdir,
                     self._rmdir, self._begin),
                    (8, 3, 6, 4, 3, 1, 2),
                )  # fmt: skip
                if (made := kind(warehouse.files, chance)) is not None:
                    self._do(*made)
            for draft in self.begun:
                warehouse.files.drop(draft)
            assert tree_of(warehouse.files) == self.tree

    def allowed(self, since: Marked | None, marked: Marked | None) -> list[Tree]:
        """The trees that may be there after a cut at *marked*, where what ended by *since* is."""
        first = 0 if since is None else since.step + since.ended
        last = -1 if marked is None else marked.step
        trees = [tree for step in self.steps[first : last + 1] for tree in step]
        return trees or [self.steps[last][-1] if last >= 0 else {}]

    def _do(self, trees: list[Tree], do: Callable[[], object]) -> None:
        self.steps.append([self.tree, *trees])
        self.recorder.mark(Marked(len(self.steps) - 1, ended=False))
        do()
        self.recorder.mark(Marked(len(self.steps) - 1, ended=True))
        self.tree = trees[-1]

    @staticmethod
    def _place(files: Files, path: bytes) -> tuple[Ino, bytes]:
        """The inode of the directory of *path*, and its name there."""
        above, _, name = path.rpartition(b"/")
        return (files.lookup(0, above[1:]).ino if above else Ino(0)), name

    def _free_paths(self) -> list[bytes]:
        """The paths that files may have now: those whose directory is there."""
        return [path for path in PATHS if path.count(b"/") == 1 or path[:2] in self.tree]

    def _there(self) -> list[bytes]:
        return [path for path, data in self.tree.items() if data is not None]

    def _bytes(self, chance: random.Random) -> bytes:
        return chance.randbytes(chance.choice(SIZES))

    def _write(self, files: Files, chance: random.Random) -> Made:
        """A file is made, or written anew."""
        path, data = chance.choice(self._free_paths()), self._bytes(chance)
        return [self.tree | {path: data}], partial(
            make_file, files, *self._place(files, path), data
        )

    def _several(self, files: Files, chance: random.Random) -> Made | None:
        """Files are closed at once."""
        free = self._free_paths()
        new: Tree = {path: self._bytes(chance) for path in chance.sample(free, AT_ONCE)}

        def store() -> None:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                futures = [
                    threads.submit(make_file, files, *self._place(files, path), data or b"")
                    for path, data in new.items()
                ]
                for future in futures:
                    future.result()

        some = [set(part) for count in range(1, AT_ONCE) for part in combinations(new, count)]
        on_the_way = [self.tree | {path: new[path] for path in part} for part in some]
        return [*on_the_way, self.tree | new], store

    def _rename(self, files: Files, chance: random.Random) -> Made | None:
        """A file gets another name, most often that of another file."""
        there = self._there()
        if not there:
            return None
        old = chance.choice(there)
        new = chance.choice([path for path in self._free_paths() if path != old])
        left = {path: data for path, data in self.tree.items() if path != old}
        return [left | {new: self.tree[old]}], partial(
            files.rename, *self._place(files, old), *self._place(files, new)
        )

    def _unlink(self, files: Files, chance: random.Random) -> Made | None:
        there = self._there()
        if not there:
            return None
        gone = chance.choice(there)
        left = {path: data for path, data in self.tree.items() if path != gone}
        return [left], partial(files.unlink, *self._place(files, gone))

    def _mkdir(self, files: Files, chance: random.Random) -> Made | None:
        absent = [path for path in DIRECTORIES if path not in self.tree]
        if not absent:
            return None
        path = chance.choice(absent)
        make = partial(files.mkdir, 0, path[1:], mode=0o755, uid=0, gid=0)
        return [self.tree | {path: None}], make

    def _rmdir(self, files: Files, chance: random.Random) -> Made | None:
        empty = [
            path for path in DIRECTORIES
            if path in self.tree and not any(each.startswith(path + b"/") for each in self.tree)
        ]  # fmt: skip
        if not empty:
            return None
        path = chance.choice(empty)
        left = {each: data for each, data in self.tree.items() if each != path}
        return [left], partial(files.rmdir, 0, path[1:])

    def _begin(self, files: Files, chance: random.Random) -> Made:
        """A file is written to the devices and not closed, or such a one is given up."""
        if len(self.begun) == BEGUN_MAX:
            return [self.tree], partial(files.drop, self.begun.pop(0))
        name = b"never" if chance.random() < 0.5 else b"a"
        data = self._bytes(chance)

        def begin() -> None:
            writer = WRITER + 1 + len(self.steps)
            draft = files.create(0, name, mode=0o644, uid=0, gid=0, writer=writer)
            files.open_draft(draft, writing=True)
            draft.write(0, data)
            files.store(draft)
            self.begun.append(draft)

        return [self.tree], begin


def sizes_of(tree: Tree) -> str:
    """What is in a tree, in few words."""
    return ", ".join(
        f"{path.decode()} ({'directory' if data is None else len(data)})"
        for path, data in tree.items()
    )
