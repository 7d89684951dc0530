"""A random Llama on the spot, for engines: made by the engine's own Python, no network.

`python -m support.randommodel DIRECTORY SEED [LAYERS] [HIDDEN]`: weights by seed, and a tokenizer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make(directory: Path, seed: int, layers: int = 2, hidden: int = 256, **config: Any) -> None:
    """Write config, bfloat16 weights and a byte tokenizer to *directory*."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["hello world this is a tiny corpus"] * 3, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    wrapper(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    ).save_pretrained(directory)  # fmt: skip
    made = LlamaConfig(
        **{
            "vocab_size": 512, "hidden_size": hidden, "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
            "num_key_value_heads": max(2, hidden // 128), "max_position_embeddings": 16384,
            "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
            # Larger than the default, so that a random model's answers depend on all of the prompt.
            "initializer_range": 0.2, **config,
        }
    )  # fmt: skip
    model: Any = LlamaForCausalLM(made)
    model.to(torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:]))
