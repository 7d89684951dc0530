"""Whatever is broken, in whatever combination, one repair mends it, and a second finds nothing.

What stays has the bytes of its name, and new blocks can be put and matched. The long run:
`TWFS_HYPOTHESIS=explore python -m pytest tests/model/test_repair_model.py`.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.breaking import KINDS, assert_payloads, break_one, fill
from support.warehouses import (
    HYBRID,
    MHA,
    chain_of,
    make_warehouse,
    open_warehouse,
    put_whole,
    read_all,
    records_of,
)
from twfs.errors import CorruptSuperblock
from twfs.recovery import repair

EXAMPLES = 600 if os.environ.get("TWFS_HYPOTHESIS") == "explore" else 30
NUMBER = st.integers(0, 1 << 20)
BREAKAGES = st.lists(
    st.tuples(st.sampled_from(KINDS), st.tuples(NUMBER, NUMBER, NUMBER)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def filled() -> Iterator[Path]:
    """A closed, sound warehouse to be copied."""
    home = Path(tempfile.mkdtemp(prefix="twfs-repair-", dir=os.environ.get("TWFS_TEST_DIR")))
    make_warehouse(home / "sound")
    with open_warehouse(home / "sound") as warehouse:
        fill(warehouse)
    yield home
    shutil.rmtree(home)


@given(breakages=BREAKAGES)
@settings(max_examples=EXAMPLES)
def test_one_repair_mends_all_and_a_second_finds_nothing(
    filled: Path, breakages: list[tuple[str, tuple[int, int, int]]]
) -> None:
    directory = filled / "broken"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(filled / "sound", directory)
    for kind, numbers in breakages:
        break_one(directory, kind, numbers)
    if sum(kind == "superblock" for kind, _ in breakages) > 1:
        with suppress(CorruptSuperblock):  # both copies may be gone, which nothing can mend
            repair.run(directory, data=True)
        return
    report = repair.run(directory, data=True)
    assert report.left == ()
    assert repair.run(directory, data=True).done == ()
    with open_warehouse(directory) as warehouse:
        with warehouse._core.metadata.read() as view:
            for key, block in records_of(warehouse._core).items():
                assert not block.hole or view.children(key)  # else it is dropped
        assert_payloads(warehouse)
        for name, layout in (("m", MHA), ("h", HYBRID)):
            model = warehouse.open_model(name, layout)
            names = chain_of(model, 5, 77)
            put_whole(warehouse, model, names)
            assert read_all(warehouse, model, names) == len(names)
