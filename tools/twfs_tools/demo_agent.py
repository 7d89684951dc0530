"""The demo's two engine processes: one that saves its KV and ends, one that answers from it.

Run as `python -m twfs_tools.demo_agent save|answer PLAN`; prints one JSON line per event. Judges
nothing: the demo does that with the figures given here.
"""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache

from twfs.client import connect
from twfs.engines.transformers import PrefixStore
from twfs.store import PutOutcome
from twfs_tools.demo_model import (
    BEHIND,
    COMPUTED,
    GENERATED,
    MODEL_NAME,
    QUESTION,
    TURNS,
    Plan,
    build_model,
    decode,
    encode,
    forward,
    generate,
    system_prompt,
    tool_result,
)

FILES: Final = ("argparse.py", "tarfile.py", "zipfile.py", "inspect.py")
OTHER_FILE: Final = "subprocess.py"
MATCH_TIMEOUT_S: Final = 5.0  # an engine waits 50 ms; two busy cores are no reason for a miss here
ROUNDS: Final = 3
CHEAP_TOKENS: Final = 2048  # up to here a cold prompt is computed ROUNDS times, beyond it once


def emit(event: str, **figures: Any) -> None:
    """Print one event."""
    print(json.dumps({"event": event, **figures}), flush=True)


class Agent:
    """A model with its PrefixStore, as an engine process has them."""

    def __init__(self, plan: Plan) -> None:
        began = time.perf_counter()
        self.plan = plan
        self.model = build_model(plan)
        self.store = connect(
            Path(plan.socket), connect_timeout_s=MATCH_TIMEOUT_S, match_timeout_s=MATCH_TIMEOUT_S
        )
        self.kv = PrefixStore(self.store, MODEL_NAME, self.model, block_tokens=plan.block_tokens)
        layout = self.kv.model.layout
        emit(
            "model",
            name=self.kv.model.name,
            parameters=sum(each.numel() for each in self.model.parameters()),
            token_bytes=layout.block_bytes() // layout.block_tokens,
            block_bytes=layout.block_bytes(),
            seconds=time.perf_counter() - began,
        )

    def turn(self, session: str, ids: list[int], kv: Any, *, loaded: int = 0) -> None:
        """Compute what *ids* has more than *kv*, answer greedily, and save."""
        began = time.perf_counter()
        before = kv.get_seq_length()
        logits = forward(self.model, ids[before:], kv)
        ids += generate(self.model, logits, kv, GENERATED)
        answered = time.perf_counter()
        result = self.kv.save(ids, kv)
        emit(
            "turn",
            session=session,
            tokens=len(ids),
            loaded=loaded,
            computed=kv.get_seq_length() - before,
            stored_blocks=result.outcomes.count(PutOutcome.PUBLISHED),
            present_blocks=result.outcomes.count(PutOutcome.PRESENT),
            held_blocks=result.held,
            stored_bytes=result.written_bytes,
            compute_s=answered - began,
            save_s=time.perf_counter() - answered,
        )


def save(plan: Plan) -> None:
    """Live through two sessions that share a system prompt, saving after every turn."""
    agent = Agent(plan)
    first: list[int] = system_prompt(plan)
    kv = DynamicCache()
    step = (plan.tokens - plan.system_tokens) // TURNS
    for number in range(TURNS):
        end = plan.system_tokens + (number + 1) * step + BEHIND - GENERATED
        first += tool_result(FILES[number % len(FILES)], end - len(first))
        agent.turn("A", first, kv)
    second = system_prompt(plan)
    second += tool_result(OTHER_FILE, step)
    other, loaded = agent.kv.load(second)
    agent.turn("B", second, other, loaded=loaded)
    _keep_reference(agent, first, kv)
    agent.store.close()


def _keep_reference(agent: Agent, history: list[int], kv: Any) -> None:
    """Write what the next process must reproduce to a file that twfs has nothing to do with."""
    plan = agent.plan
    prompt = history + encode(QUESTION)
    tensors = [
        (layer.keys[:, :, : plan.tokens].clone(), layer.values[:, :, : plan.tokens].clone())
        for layer in kv.layers
    ]
    never_saved = DynamicCache()
    for index, (keys, values) in enumerate(tensors):
        never_saved.update(keys, values, index)
    logits = forward(agent.model, prompt[plan.tokens :], never_saved, keep=COMPUTED)
    answer = generate(agent.model, logits, never_saved, GENERATED)
    torch.save(
        {"prompt": prompt, "kv": tensors, "logits": logits.clone(), "answer": answer},
        plan.reference,
    )
    emit("reference", prompt_tokens=len(prompt), sha256=_sha256(tensors))


def _sha256(tensors: Any) -> str:
    """Return the SHA-256 over K and V of all layers."""
    state = hashlib.sha256()
    for pair in tensors:
        for tensor in pair:
            state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def answer(plan: Plan) -> None:
    """Answer from saved KV, compare everything with the first process, and measure."""
    agent = Agent(plan)
    reference = torch.load(plan.reference, weights_only=True)
    prompt: list[int] = reference["prompt"]
    forward(agent.model, prompt[:64], DynamicCache())  # the first call of all sets torch up
    began = time.perf_counter()
    kv, held = agent.kv.load(prompt)
    loaded_at = time.perf_counter()
    loaded = [(layer.keys.clone(), layer.values.clone()) for layer in kv.layers]
    cloned_s = time.perf_counter() - loaded_at
    logits = forward(agent.model, prompt[held:], kv, keep=COMPUTED)
    ttft_s = time.perf_counter() - began - cloned_s
    words = generate(agent.model, logits, kv, GENERATED)
    emit(
        "answer",
        prompt_tokens=len(prompt),
        held_tokens=held,
        load_s=loaded_at - began,
        ttft_s=ttft_s,
        text=decode(words),
    )
    same_size = len(loaded) == len(reference["kv"])
    emit(
        "equal",
        kv=same_size
        and all(
            torch.equal(mine, theirs)
            for pair, other in zip(loaded, reference["kv"], strict=True)
            for mine, theirs in zip(pair, other, strict=True)
        ),
        sha256=_sha256(loaded),
        logits=torch.equal(logits, reference["logits"]),
        logits_compared=logits.numel(),
        answer=words == reference["answer"],
    )
    del loaded, kv
    _measure(agent, prompt, logits[-1], words)
    agent.store.close()


def _measure(agent: Agent, prompt: list[int], warm_logits: torch.Tensor, words: list[int]) -> None:
    """Time cold and warm answers by turns; the longest cold one is the full recompute."""
    for length in agent.plan.lengths:
        ids = prompt[:length] + prompt[-COMPUTED:]
        cold, warm, load, held = [], [], [], 0
        for number in range(ROUNDS):
            if number == 0 or length <= CHEAP_TOKENS:
                began = time.perf_counter()
                kv = DynamicCache()
                logits = forward(agent.model, ids, kv)
                cold.append(time.perf_counter() - began)
                if length == agent.plan.tokens and number == 0:
                    emit(
                        "recompute",
                        logits_difference_max=float((logits[-1] - warm_logits).abs().max()),
                        answer=generate(agent.model, logits, kv, GENERATED) == words,
                    )
            began = time.perf_counter()
            kv, held = agent.kv.load(ids)
            load.append(time.perf_counter() - began)
            forward(agent.model, ids[held:], kv)
            warm.append(time.perf_counter() - began)
            del kv
        emit(
            "timing",
            prompt_tokens=len(ids),
            held_tokens=held,
            cold_s=statistics.median(cold),
            cold_rounds=len(cold),
            warm_s=statistics.median(warm),
            warm_rounds=len(warm),
            load_s=statistics.median(load),
        )


if __name__ == "__main__":
    {"save": save, "answer": answer}[sys.argv[1]](Plan.load(sys.argv[2]))
