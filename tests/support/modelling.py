"""What the model tests share: chains along short paths, so that they meet, and fresh payloads."""

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
from hypothesis import strategies as st

from support.warehouses import BLOCK_TOKENS, MHA, SHARDED
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.store import Model

MODEL_LAYOUTS: Final[dict[str, Layout]] = {"plain": MHA, "sharded": SHARDED}

paths = st.lists(st.integers(0, 1), min_size=1, max_size=6)
which = st.sampled_from(sorted(MODEL_LAYOUTS))


def examples(quick: int) -> int:
    """How many examples to run: *quick*, or thirty times that under TWFS_HYPOTHESIS=explore."""
    return quick * (30 if os.environ.get("TWFS_HYPOTHESIS") == "explore" else 1)


def names_along(model: Model, path: Sequence[int]) -> Names:
    """The chain along *path*: every block one token, many times."""
    chain = model.chain()
    for step in path:
        chain.extend([step] * BLOCK_TOKENS)
    return chain.names()


def fresh_payload(layout: Layout, number: int) -> bytes:
    """A payload that no other *number* has."""
    return np.random.default_rng(number).bytes(layout.block_bytes())
