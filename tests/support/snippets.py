"""The fenced blocks of the pages in docs/, for tests that run them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).parents[2] / "docs"


def snippets_of(page: str, language: str) -> list[str]:
    """All blocks of *language* in a page, in order."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def settings_of(page: str, engine: str) -> list[str]:
    """What is in backquotes in the row of *engine* in a page's table of settings."""
    text = (DOCS / page).read_text()
    (row,) = re.findall(rf"^\| {re.escape(engine)} \|(.*)\|$", text, re.MULTILINE)
    return re.findall(r"`([^`]+)`", row)


def run_lines(page: str, number: int, **replaced: str) -> list[str]:
    """Run the lines of a page's sh block, with texts replaced; what each says. None may fail."""
    text = snippets_of(page, "sh")[number]
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    said = []
    for line in text.splitlines():
        done = subprocess.run(
            ["sh", "-c", line], env={**os.environ, "PATH": search}, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        said.append(done.stdout)
    return said
