"""SGLang as a process that a test drives: one JSON request a line in, one JSON answer a line out.

`python -m support.sglangengine OPTIONS` runs in the engine's environment; OPTIONS are JSON: what
sglang.Engine is given. Requests: generate, flush, update (weights, from a directory). SGLang's own
output goes to stderr.
"""

import importlib
import json
import os
import sys
import time
from typing import Any, Final

from support.answering import Answers
from support.vllmengine import prompt_of

if os.environ.get("HOST_POOL_ON_CPU"):  # in the processes that SGLang starts too
    importlib.import_module("support.sglanghost")

FLUSH_S: Final = 60.0


def answer(engine: Any, request: dict[str, Any]) -> Any:
    """Do what *request* asks."""
    if request["do"] == "flush":
        flush = engine.tokenizer_manager.flush_cache(timeout_s=FLUSH_S)  # refused until it is idle
        return engine.loop.run_until_complete(flush).success
    if request["do"] == "update":
        success, message, *_ = engine.update_weights_from_disk(request["path"])
        return message if not success else ""
    return generate(engine, request)


def generate(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answer a list of prompts with *out* tokens each; *named* are more fields of the request."""
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import GenerateReqInput

    begun_s = time.perf_counter()
    asked = GenerateReqInput(
        input_ids=[prompt_of(each["seed"], each["tokens"]) for each in request["prompts"]],
        sampling_params={
            "max_new_tokens": request.get("out", 1), "temperature": 0, "ignore_eos": True,
        },
        **request.get("named", {}),
    )  # fmt: skip
    # As Engine.generate does, which has no extra_key.
    answers = engine.tokenizer_manager.generate_request(asked, None)
    try:
        outputs = engine.loop.run_until_complete(anext(answers))
    except HTTPException as error:
        return {"aborted": error.detail}
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
