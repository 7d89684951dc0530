"""The demo proves what it says, fails if it cannot, and leaves nothing but its plot.

The real command, daemon, mount and engines, on the small model.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from twfs.errors import EqualityFailed
from twfs_tools.demo import verdicts_of

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GOOD: Final[dict[str, Any]] = {
    "tokens": 1024,
    "answer": {"held_tokens": 1024},
    "reference": {"sha256": "a"},
    "equal": {"kv": True, "sha256": "a", "logits": True, "logits_compared": 9, "answer": True},
    "recompute": {"logits_difference_max": 1e-5, "answer": True},
}


def start(scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "twfs_tools.cli", "demo", "--quick", "--plot",
         str(scratch / "out" / "ttft.png"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip


@pytest.mark.fuse
def test_quick_demo_proves_equality_and_leaves_only_its_plot(scratch: Path) -> None:
    demo = start(scratch, "--json")
    output, errors = demo.communicate()
    assert demo.returncode == 0, errors
    figures = json.loads(output)
    assert len(figures["verdicts"]) == 5
    assert all(verdict["holds"] for verdict in figures["verdicts"])
    assert [each["session"] for each in figures["turns"]] == ["A", "A", "A", "A", "B"]
    assert figures["turns"][-1]["loaded"] == 256
    assert [each["held_tokens"] for each in figures["timings"]] == [128, 256, 512, 1024]
    shared = next(text for line, text in figures["commands"].items() if line.startswith("stat "))
    assert shared.count("2 links") == 2
    assert [path.name for path in scratch.rglob("*")] == ["out", "ttft.png"]
    assert (scratch / "out" / "ttft.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_stopped_leaves_nothing(scratch: Path, number: signal.Signals) -> None:
    demo = start(scratch)
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("session A"):
            demo.send_signal(number)
            break
    demo.communicate()
    assert demo.returncode == 128 + number
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [
        ("answer", "held_tokens", 960),
        ("equal", "kv", False),
        ("equal", "sha256", "b"),
        ("equal", "logits", False),
        ("equal", "answer", False),
        ("recompute", "answer", False),
        ("recompute", "logits_difference_max", 1.1e-3),
        ("recompute", "logits_difference_max", float("nan")),
    ],
)
def test_any_difference_fails_the_demo(of: str, name: str, value: object) -> None:
    assert all(verdicts_of(GOOD).values())
    bad = {**GOOD, of: {**GOOD[of], name: value}}
    assert list(verdicts_of(bad).values()).count(False) == 1
    assert EqualityFailed.exit_code == 31
