"""A mounted warehouse for each test of the mount."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounting import Mount, mounted


@pytest.fixture
def mount(scratch: Path) -> Iterator[Mount]:
    """An empty warehouse, mounted; it must end without finding."""
    with mounted(scratch / "warehouse", scratch / "mnt") as made:
        yield made
