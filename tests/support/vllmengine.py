"""vLLM as a process that a test drives: one JSON request a line in, one JSON answer a line out.

`python -m support.vllmengine OPTIONS` runs in the engine's environment; OPTIONS are JSON: arguments
of vllm.LLM. Requests: see REQUESTS. Answers go to what was stdout; vLLM's own output goes to
stderr.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from support.answering import Answers


def prompt_of(seed: int, tokens: int) -> list[int]:
    """Token ids of a prompt that only its seed decides, longer ones beginning with shorter ones."""
    return [(i * 7919 + seed * 31 + (i * i) % 97) % 290 + 5 for i in range(tokens)]


def generate(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answer a list of prompts (seed and tokens, or ids) with *out* tokens each."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": each.get("ids") or prompt_of(each["seed"], each["tokens"])}
        | ({"cache_salt": each["salt"]} if "salt" in each else {})
        for each in request["prompts"]
    ]  # fmt: skip
    extra = request.get("params")
    sampling = SamplingParams(
        max_tokens=request.get("out", 1), temperature=0, ignore_eos=True,
        extra_args={"kv_transfer_params": extra} if extra else None,
    )  # fmt: skip
    begun_s = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - begun_s,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "finish": [output.outputs[0].finish_reason for output in outputs],
    }


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler, which is in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def idle(llm: Any) -> None:
    """Step on as an engine in a process of its own does, until nothing is left to do."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step_fn()
        time.sleep(0.001)


def empty(llm: Any) -> None:
    """Empty the engine's own memory and vLLM's CPU tier, and nothing below that.

    It is what a reset does where the connector is vLLM's own.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
        OffloadingConnector,
    )

    idle(llm)
    assert llm.reset_prefix_cache()
    OffloadingConnector.reset_cache(scheduler_of(llm).connector)


def pause(llm: Any) -> None:
    """Pause and go on, as an engine does before it sleeps and before its weights change."""
    core = llm.llm_engine.engine_core.engine_core
    core.pause_scheduler(mode="abort", clear_cache=True)
    core.resume_scheduler()


def events(scheduler: Any) -> dict[str, Any]:
    """What was told of as stored outside the engine from the first call on: hashes, tokens.

    And of how many blocks vLLM still keeps what an event would say.
    """
    publisher = scheduler.kv_event_publisher
    if "told" not in vars(publisher):
        publisher.told = []
        publisher.publish = lambda batch: publisher.told.extend(batch.events)
    told = [
        event
        for event in publisher.told
        if type(event).__name__ == "BlockStored" and event.medium == "STORAGE"
    ]
    tracker = scheduler.connector.connector_scheduler._events_tracker
    return {
        "hashes": [str(each) for event in told for each in event.block_hashes],
        "tokens": [token for event in told for token in event.token_ids],
        "kept": len(tracker._pending_event_metadata),
    }


def told_of(llm: Any) -> dict[str, Any]:
    """As `events`, once the engine has nothing left to do."""
    idle(llm)
    return events(scheduler_of(llm))


def metrics(llm: Any) -> dict[str, Any]:
    """What vLLM counts."""
    return {each.name: each.value for each in llm.get_metrics() if hasattr(each, "value")}


def counts_of_worker(_: Any) -> dict[str, int]:
    """What our worker's side counts, where the worker is in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    group: Any = get_kv_transfer_group()
    counts: dict[str, int] = group.connector_worker.worker.attachment.statistics()
    return counts


def counts_of_tier(llm: Any) -> dict[str, int]:
    """What the tier below the CPU tier counts."""
    (tier,) = scheduler_of(llm).connector.scheduler.manager.secondary_tiers
    counts: dict[str, int] = tier.attachment.statistics()
    return counts


def set_deadline(llm: Any, seconds: float) -> None:
    """Let each load take so long from now on, whatever the engine was started with."""
    scheduler_of(llm).connector.manager.breakeven.given_s = seconds


REQUESTS: Final[dict[str, Callable[[Any, dict[str, Any]], Any]]] = {
    "generate": generate,
    "reset": lambda llm, more: llm.reset_prefix_cache(reset_connector=more.get("connector", False)),
    "idle": lambda llm, _: idle(llm),
    "empty": lambda llm, _: empty(llm),
    "pause": lambda llm, _: pause(llm),
    "metrics": lambda llm, _: metrics(llm),
    "connector": lambda llm, _: counts_of_worker(llm),
    "deadline": lambda llm, more: set_deadline(llm, more["seconds"]),
    "threads": lambda *_: [each.name for each in threading.enumerate()],
    "tier": lambda llm, _: counts_of_tier(llm),
    # Seconds per token of computing, as the scheduler has been told.
    "estimate": lambda llm, _: scheduler_of(llm).connector.manager.breakeven.compute_s,
    "events": lambda llm, _: told_of(llm),
}


def main() -> None:
    """Serve until stdin ends."""
    answers = Answers()
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]))
    for request in answers.requests():
        answers.say(REQUESTS[request["do"]](llm, request))


if __name__ == "__main__":
    main()
