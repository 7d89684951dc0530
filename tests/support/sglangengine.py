"""SGLang as a process that a test drives: one JSON request a line in, one JSON answer a line out.

`python -m support.sglangengine OPTIONS` runs in the engine's environment; OPTIONS are JSON: what
sglang.Engine is given. Requests: generate, flush. SGLang's own output goes to stderr.
"""

import json
import sys
import time
from typing import Any

from support.answering import Answers
from support.vllmengine import prompt_of


def answer(engine: Any, request: dict[str, Any]) -> Any:
    """Do what *request* asks."""
    if request["do"] == "flush":
        engine.flush_cache()
        return True
    begun_s = time.perf_counter()
    outputs = engine.generate(
        input_ids=[prompt_of(each["seed"], each["tokens"]) for each in request["prompts"]],
        sampling_params={
            "max_new_tokens": request.get("out", 1), "temperature": 0, "ignore_eos": True,
        },
    )  # fmt: skip
    return {
        "seconds": time.perf_counter() - begun_s,
        "tokens": [output["output_ids"] for output in outputs],
        "cached": [output["meta_info"]["cached_tokens"] for output in outputs],
        "finish": [output["meta_info"]["finish_reason"]["type"] for output in outputs],
    }


def main() -> None:
    """Serve until stdin ends."""
    answers = Answers()
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[1]))
    for request in answers.requests():
        answers.say(answer(engine, request))
    engine.shutdown()


if __name__ == "__main__":
    main()
