"""The fenced blocks of the pages in docs/, for tests that run them."""

import re
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).parents[2] / "docs"


def snippets_of(page: str, language: str) -> list[str]:
    """All blocks of *language* in a page, in order."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
