"""How fast vLLM computes prompts on this rank: what the store's hits are worth.

vLLM's connectors are told of no times. So the scheduler says of each step whether it computes
prompts alone, and of how many tokens; the worker times the step's forward pass: by its clock on a
CPU, by events on its stream on a GPU, for which nothing waits. A step with a load, with a token of
an answer, or with few tokens tells nothing. Used by the worker's thread.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twfs.engines.attaching import Attachment
from twfs.engines.breakeven import TOKENS_MIN
from twfs.engines.finding import Desk

REPORT_SECONDS: Final = 1.0  # of prefill, at least, in one report
OPEN_MAX: Final = 64  # steps whose end a GPU has not reached; more are not timed


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the scheduler says of a step that computes prompts alone."""

    tokens: int
    tenant: str | None


def prompt_tokens(scheduler_output: Any) -> int:
    """Tokens of a step (vLLM's SchedulerOutput) that computes prompts alone; 0 of any other."""
    if any(scheduler_output.scheduled_cached_reqs.num_output_tokens):
        return 0
    tokens: int = scheduler_output.total_num_scheduled_tokens
    return tokens if tokens >= TOKENS_MIN else 0


class Mark:
    """A moment on the worker's clock; done as soon as it is made."""

    def __init__(self) -> None:
        self.at_s = time.monotonic()

    def reached(self) -> bool:
        """Whether the work that was submitted before it has been done."""
        return True

    def seconds_since(self, earlier: Any) -> float:
        """Seconds from *earlier*, a mark of the same kind."""
        at_s: float = self.at_s - earlier.at_s
        return at_s


class GpuMark:
    """A moment on the current stream of a GPU."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415 - the engine that calls has imported it

        make: Any = torch.cuda.Event
        self.event = make(enable_timing=True)
        self.event.record()

    def reached(self) -> bool:
        """Whether the work that was submitted before it has been done; waits for nothing."""
        return bool(self.event.query())

    def seconds_since(self, earlier: Any) -> float:
        """Seconds from *earlier*, a mark of the same kind."""
        return float(earlier.event.elapsed_time(self.event)) / 1000


class PrefillTimes:
    """Times a rank's steps and reports them to the store, on a thread of its own."""

    def __init__(self, attachment: Attachment, mark: Callable[[], Any] = Mark) -> None:
        self._attachment = attachment
        self._mark = mark
        self._begun: tuple[Prompts, Any] | None = None
        self._open: deque[tuple[Prompts, Any, Any]] = deque()
        self._tokens, self._seconds = 0, 0.0
        self._fresh = (0, 0.0)  # tokens and seconds that `take` has not told
        self._tenant: str | None = None
        self._desk = Desk("twfs-prefill")

    def begin(self, prompts: Prompts | None) -> None:
        """A step begins; None: one that tells nothing."""
        usable = prompts is not None and len(self._open) < OPEN_MAX
        self._begun = (prompts, self._mark()) if usable and prompts is not None else None

    def end(self) -> None:
        """The step's forward pass is submitted; count those that are done, and report at times."""
        if self._begun is not None:
            self._open.append((*self._begun, self._mark()))
            self._begun = None
        while self._open and self._open[0][2].reached():
            prompts, begun, ended = self._open.popleft()
            seconds = ended.seconds_since(begun)
            self._tokens += prompts.tokens
            self._seconds += seconds
            self._fresh = (self._fresh[0] + prompts.tokens, self._fresh[1] + seconds)
            self._tenant = prompts.tenant
        if self._seconds >= REPORT_SECONDS:
            self._report()

    def take(self) -> tuple[int, float] | None:
        """Tokens computed, and in how many seconds, since the last call; None: nothing new."""
        fresh, self._fresh = self._fresh, (0, 0.0)
        return fresh if fresh[0] else None

    def _report(self) -> None:
        tokens, seconds, tenant = self._tokens, self._seconds, self._tenant
        self._tokens, self._seconds = 0, 0.0

        def tell() -> None:
            model = self._attachment.model(tenant)
            if model is not None:
                self._attachment.store.count_prefill(model, tokens, seconds)

        self._desk.put(
            lambda: self._attachment.quietly("prefill could not be reported", tell, None)
        )

    def close(self) -> None:
        """Report the rest, and end the thread. Idempotent."""
        if self._tokens and self._seconds > 0:
            self._report()
        self._desk.close(self._attachment.patience_s * 4)
