"""The demo's model, prompts and plan: everything that both of its processes must make alike.

Random weights from a fixed seed: the words mean nothing, the arithmetic is that of any model of
this size. Nothing is downloaded.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

SEED: Final = 20261123
THREADS: Final = 2  # fixed: another number adds up in another order, and bits would differ
VOCABULARY: Final = 256  # a token is a byte
TURNS: Final = 4
GENERATED: Final = 8  # tokens that the model answers a turn with
BEHIND: Final = 40  # tokens of the last turn behind its last whole block
QUESTION: Final = "\n[user] Which one is it?"
COMPUTED: Final = BEHIND + len(QUESTION)  # what a warm answer has to compute
SYSTEM: Final = "[system] You are a careful programmer. Read what the tools show, then answer.\n"
MODEL_NAME: Final = "demo-llama"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one demo does: sizes in tokens, places, and whether the small model is used."""

    tokens: int  # of the history that is saved; a multiple of eight blocks
    block_tokens: int
    quick: bool
    socket: str
    reference: str  # a file outside the warehouse, with the KV and logits of the first process

    @property
    def system_tokens(self) -> int:
        """The part that both sessions share."""
        return self.tokens // 4

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prompt lengths to measure, in tokens held."""
        return tuple(self.tokens // part for part in (8, 4, 2, 1))

    def dump(self) -> str:
        """Return the plan as JSON, for a process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> "Plan":
        """Make a plan of what dump returned."""
        return cls(**json.loads(text))


def encode(text: str) -> list[int]:
    """Return the tokens of *text*: its bytes."""
    return list(text.encode())


def decode(ids: Sequence[int]) -> str:
    """Return what tokens say, unreadable bytes as escapes."""
    return bytes(ids).decode("ascii", errors="backslashreplace")


def build_model(plan: Plan) -> Any:
    """Return the model: about 100 M parameters, or a tiny one for a quick run."""
    import torch  # noqa: PLC0415 - seconds, and the parent process never needs it
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    hidden, layers, heads, kv_heads, inner = (
        (128, 2, 4, 2, 256) if plan.quick else (768, 12, 12, 4, 3072)
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * plan.tokens,
        initializer_range=0.05,  # larger than usual: with 0.02 an untrained model repeats itself
        tie_word_embeddings=False,  # tied and random, it would only echo its last token
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.float32).eval()


def system_prompt(plan: Plan) -> list[int]:
    """Return what every session begins with: instructions and a file that all tools work on."""
    return encode(SYSTEM + _file("ast.py"))[: plan.system_tokens]


def tool_result(name: str, tokens: int) -> list[int]:
    """Return a tool's answer of exactly *tokens* tokens: a file of the standard library."""
    ids = encode(f"\n[tool] cat {name}\n" + _file(name))
    while len(ids) < tokens:
        ids += ids
    return ids[:tokens]


def _file(name: str) -> str:
    """Return the source of a module of the standard library."""
    return (Path(asyncio.__file__).parent.parent / name).read_text()


def forward(model: Any, ids: Sequence[int], kv: Any, keep: int = 1) -> "Tensor":
    """Compute *ids* behind *kv*, which grows by them; return the logits of the last *keep*."""
    import torch  # noqa: PLC0415

    with torch.inference_mode():
        out = model(
            torch.tensor([list(ids)]), past_key_values=kv, use_cache=True, logits_to_keep=keep
        )
    logits: Tensor = out.logits[0]
    return logits


def generate(model: Any, logits: "Tensor", kv: Any, count: int) -> list[int]:
    """Return *count* greedy tokens, the first of them from *logits*."""
    answer = [int(logits[-1].argmax())]
    while len(answer) < count:
        answer.append(int(forward(model, answer[-1:], kv)[-1].argmax()))
    return answer
