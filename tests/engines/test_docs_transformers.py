"""docs/transformers.md: its snippets run as they stand, with a real daemon and a random model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import Daemon, running_daemon
from support.snippets import run_lines, snippets_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.engine

TOKENS: Final = 600


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    with running_daemon(scratch / "w") as running:
        yield running


def test_the_snippets_run_and_the_second_time_they_hit(daemon: Daemon) -> None:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    source = "\n".join(snippets_of("transformers.md", "python"))
    source = source.replace("/var/lib/twfs/socket", str(daemon.socket))
    ids = torch.arange(TOKENS).remainder(251).reshape(1, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :40] = 0
    names: dict[str, Any] = {
        "model": transformers.LlamaForCausalLM(config).eval(), "ids": ids,
        "batch": torch.cat([ids, ids + 1]), "attention_mask": mask,
    }  # fmt: skip
    with torch.inference_mode():
        exec(source, names)
        assert (names["held"], names["columns"]) == (512, 40)  # one row is new: only its padding
        exec(source, names)
    assert (names["held"], names["columns"]) == (512, 512)
    assert names["kv"].statistics()["hit_tokens"] > 0
    status, listed = run_lines("transformers.md", 1, **{"/var/lib/twfs": str(daemon.directory)})
    assert re.search(r"^read by host: .* blocks", status, re.MULTILINE), status
    assert re.search(r"^hits since the start: \d", status, re.MULTILINE), status
    assert names["kv"].model.name in listed
    assert re.search(r"^2 sessions", listed.replace("  ", ""), re.MULTILINE), listed
