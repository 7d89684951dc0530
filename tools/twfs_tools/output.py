"""What every tool prints with: tables for people, one JSON document for programs, sizes, progress.

Results go to stdout, everything else to stderr. One thread.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Self
from uuid import UUID

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from twfs.errors import InvalidInput
from twfs.layout import Layout
from twfs.units import ByteCount

UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
SIZE_PATTERN: Final = re.compile(
    r"^([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGTPE]?)(?:i?B)?\Z", re.IGNORECASE
)
WIDTH_WITHOUT_TERMINAL: Final = 250  # a pipe has no width, and must not lose columns to one

PLAIN: Final[dict[type, Callable[[Any], Any]]] = {
    Layout: Layout.to_dict,
    bytes: bytes.hex,
    Enum: lambda value: value.value,
    Path: str,
    UUID: str,
    set: sorted,
    frozenset: sorted,
    np.generic: lambda value: value.item(),
}

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def parse_size(text: str) -> ByteCount:
    """Return the bytes that *text* (`4096`, `64G`, `1.5TiB`; binary units) means; InvalidInput."""
    found = SIZE_PATTERN.match(text.strip())
    if found is None:
        raise InvalidInput(f"{text!r} is not a size: write 4096, 512M, 64G or 1.5T (binary units)")
    power = "BKMGTPE".index(found[2].upper() or "B")
    return ByteCount(int(float(found[1]) * 1024**power) if "." in found[1] else
                     int(found[1]) * 1024**power)  # fmt: skip


def size(byte_count: float) -> str:
    """Show *byte_count* in binary units, as `1.5 GiB`."""
    amount = float(byte_count)
    for unit in UNITS[:-1]:
        if abs(amount) < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} {UNITS[-1]}"


def age(stamp_ms: int) -> str:
    """Show how long ago the wall-clock time *stamp_ms* was."""
    seconds = max(0.0, time.time() - stamp_ms / 1000)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} d ago"


def _plain(value: object) -> Any:
    """Turn our types into JSON's; for json.dumps."""
    if is_dataclass(value) and not isinstance(value, Layout | type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    for kind, plain in PLAIN.items():
        if isinstance(value, kind):
            return plain(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def print_json(document: object) -> None:
    """Print *document* (our dataclasses, bytes, enums and paths too) as one JSON document."""
    print(json.dumps(document, default=_plain, indent=2, ensure_ascii=False))


def _console(*, stderr: bool) -> Console:
    """Make a console that keeps its columns where there is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, width=width, highlight=False, emoji=False)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print *rows* under *columns*; a column whose name begins with `>` stands to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(
            name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _console(stderr=False).print(table)


def say(text: str) -> None:
    """Print one line for a person on stdout."""
    print(text)


def complain(text: str) -> None:
    """Print one line on stderr, named as ours."""
    one_line = " ".join(text.split())
    print(f"twfs: {one_line}", file=sys.stderr)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show *text* with a spinner while the block runs; nothing where stderr is no terminal."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


class Steps:
    """A progress bar on stderr, or nothing where that is no terminal; a context manager."""

    def __init__(self, text: str, total: int) -> None:
        console = _console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Count *count* more steps as done; *text* replaces the description."""
        self._progress.advance(self._task, count)
        if text is not None:
            self._progress.update(self._task, description=text)


class Gauge:
    """How far something in several phases is, on stderr; nothing where that is no terminal.

    The first estimate of each phase stays as a line. May be shown from any thread.
    """

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._estimated: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, detail="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(
        self, phase: str, done: int, total: int, detail: str, seconds_left: float | None
    ) -> None:
        """Show that *done* of *total* is done in *phase*, and the time that is left."""
        if not self._console.is_terminal:
            return
        if seconds_left is not None:
            if phase not in self._estimated:
                self._estimated.add(phase)
                self._console.print(f"{phase}: about {seconds_left:.0f} s left")
            detail += f", {seconds_left:.0f} s left"
        self._progress.update(
            self._task, description=phase, completed=done, total=total, detail=detail,
            refresh=done >= total,
        )  # fmt: skip
