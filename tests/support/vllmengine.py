"""vLLM as a process that a test drives: one JSON request a line in, one JSON answer a line out.

`python -m support.vllmengine OPTIONS` runs in the engine's environment; OPTIONS are JSON: arguments
of vllm.LLM. Requests: generate, reset, metrics, sleep. Answers go to what was stdout; vLLM's own
output goes to stderr.
"""

import json
import sys
import time
from typing import Any

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


def answer(llm: Any, request: dict[str, Any]) -> Any:
    """Do what *request* asks."""
    match request["do"]:
        case "generate":
            return generate(llm, request)
        case "reset":
            return llm.reset_prefix_cache(reset_connector=request.get("connector", False))
        case "metrics":
            return {
                metric.name: metric.value
                for metric in llm.get_metrics()
                if hasattr(metric, "value")
            }
        case "connector":  # what our side counts, where the engine is in this process
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            worker: Any = get_kv_transfer_group()
            return worker.connector_worker.worker.attachment.statistics()
        case "estimate":  # seconds per token of computing, as the scheduler has been told
            return scheduler_of(llm).connector.manager.breakeven.compute_s
        case "events":
            idle(llm)
            return events(scheduler_of(llm))
        case _:
            pass
    raise ValueError(request)


def main() -> None:
    """Serve until stdin ends."""
    answers = Answers()
    from vllm import LLM

    llm = LLM(**json.loads(sys.argv[1]))
    for request in answers.requests():
        answers.say(answer(llm, request))


if __name__ == "__main__":
    main()
