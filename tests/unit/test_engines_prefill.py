"""Prefill rates that vLLM's worker reports are of steps with prompts alone, as their marks say.

A real daemon; the steps and their times are given, since vLLM's own decide nothing here.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.daemon import PATIENT_S, running_daemon
from twfs.engines.attaching import Attachment
from twfs.engines.vllm_prefill import OPEN_MAX, Mark, PrefillTimes, Prompts, prompt_tokens
from twfs.layout import Arrangement, Group, Layout

LAYOUT = Layout("prefill", (Group(1, arrangement=Arrangement.OPAQUE, layer_bytes=4096),), 16)


class Steps:
    """Marks of a stream whose work is done when the test says so; each 0.4 s behind the other."""

    def __init__(self) -> None:
        self.made = 0
        self.done = 0

    def __call__(self) -> Any:
        self.made += 1
        at = self.made
        return SimpleNamespace(
            at=at,
            reached=lambda: at <= self.done,
            seconds_since=lambda earlier: 0.4 * (at - earlier.at),
        )


def step(cached: list[int], tokens: int) -> Any:
    """What vLLM's scheduler says of a step: output tokens of running requests, tokens in all."""
    return SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(num_output_tokens=cached),
        total_num_scheduled_tokens=tokens,
    )


def test_only_steps_of_prompts_alone_are_timed() -> None:
    assert prompt_tokens(step([], 2048)) == 2048
    assert prompt_tokens(step([0, 0], 512)) == 512  # further parts of long prompts
    assert prompt_tokens(step([0, 1], 2048)) == 0  # somebody's answer is in it
    assert prompt_tokens(step([], 63)) == 0
    assert prompt_tokens(step([], 0)) == 0


def test_what_is_reported_is_what_the_marks_measured(scratch: Path) -> None:
    with running_daemon(scratch / "w") as daemon:
        attachment = Attachment(daemon.socket, "m", LAYOUT, patience_s=PATIENT_S)
        steps = Steps()
        times = PrefillTimes(attachment, steps)
        told: list[tuple[int, float]] = []
        real = attachment.store.count_prefill

        def tell(model: Any, tokens: int, seconds: float) -> None:
            told.append((tokens, round(seconds, 6)))
            real(model, tokens, seconds)

        attachment.store.count_prefill = tell  # type: ignore[method-assign]
        for tokens in (1000, 3000, 0, 2000):
            times.begin(Prompts(tokens, None) if tokens else None)
            times.end()
        assert steps.made == 6
        assert told == []  # the stream has done none of it, and nobody waited
        steps.done = 4
        times.begin(None)
        times.end()
        steps.done = 6
        times.begin(None)
        times.end()  # 1.2 s of 6,000 tokens: one report
        tokens, seconds = times.take() or (0, 0.0)
        assert (tokens, round(seconds, 6)) == (6000, 1.2)
        assert times.take() is None
        times.begin(Prompts(500, None))
        steps.done = 8
        times.end()
        times.close()  # with the rest
        times.close()
        assert told == [(6000, 1.2), (500, 0.4)]
        attachment.close()
        assert attachment.statistics() == {}


def test_a_gpu_that_lags_and_an_absent_daemon_cost_nothing(tmp_path: Path) -> None:
    attachment = Attachment(tmp_path / "none", "m", LAYOUT, patience_s=0.05)
    steps = Steps()
    times = PrefillTimes(attachment, steps)
    for _ in range(OPEN_MAX + 50):
        times.begin(Prompts(100, None))
        times.end()
    assert steps.made == 2 * OPEN_MAX
    steps.done = steps.made
    times.end()
    times.close()
    attachment.close()
    assert attachment.statistics() != {}


def test_a_mark_of_a_cpu_is_reached_at_once_and_later_than_one_before() -> None:
    first = Mark()
    second = Mark()
    assert second.reached()
    assert second.seconds_since(first) >= 0
    assert first.seconds_since(second) == pytest.approx(-second.seconds_since(first))
