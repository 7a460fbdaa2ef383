"""A random Qwen2 model and a tokenizer with a chat template, as one folder that this trainer and TRL's both take.

python bench/common/random_policy.py --size cpu --out runs/step-model
"""

from __future__ import annotations

import argparse
import gc
import string
import sys
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench.common.shapes import published_shape

# Qwen2's own names: transformers would add those that are missing.
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKUP = ("<tool_call>", "</tool_call>")
FIXED = (PAD, START, END, *MARKUP)
"""Tokens by id, below the bytes."""
# What a tool says stands under "user", as in Qwen2.5's template. Tools are not listed: each trainer describes them in
# its own words, and prompts have to be equal.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{%- set function = {'name': call.function.name, 'arguments': call.function.arguments} -%}
{{ '\\n<tool_call>\\n' ~ function | tojson ~ '\\n</tool_call>' }}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
"""How transformers (5.13 and later) reads a message back, tool calls included; TRL runs the calls found so."""


@dataclass(frozen=True)
class ModelSize:
    """Shape of a model and the type its files are saved in."""

    shape: dict[str, Any] | str
    """Fields of a Qwen2 config.json, or the name of such a file in configs/paper/shapes."""
    dtype: torch.dtype


def _small(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }


SIZES = {
    "tiny": ModelSize(_small(1024, 64, 96, 2, 2, 1, 1024), torch.float32),
    "cpu": ModelSize(_small(16384, 256, 768, 4, 4, 2, 4096), torch.float32),
    "qwen2.5-1.5b": ModelSize("qwen2.5-1.5b", torch.bfloat16),
}
"""Models by name: for tests, for two cores (head, blocks and the interpreter all show), for a GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Write the folder that the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    args = parser.parse_args(arguments)
    build(args.size, args.out, seed=args.seed, device=args.device)
    return 0


def build(size: str, folder: Path, *, seed: int = 0, device: str | torch.device = "cpu") -> Path:
    """Write model and tokenizer of a size to `folder` and return it; equal seeds give equal weights on one device.

    Raises:
        ValueError: `size` is not one of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; choose from {', '.join(SIZES)}")
    folder.mkdir(parents=True, exist_ok=True)
    shape = model_shape(size)
    tokenizer = make_tokenizer(shape["vocab_size"])
    tokenizer.save_pretrained(folder)
    shape = {name: value for name, value in shape.items() if name not in ("architectures", "model_type")}
    # A padding id would freeze that token's embedding.
    config = Qwen2Config(**shape, bos_token_id=None, eos_token_id=FIXED.index(END), pad_token_id=None)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = Qwen2ForCausalLM(config)
    torch.nn.Module.to(model, dtype=SIZES[size].dtype)
    model.save_pretrained(folder)
    del model
    if device.type == "cuda":
        # Trainers that are measured in other processes need what this one would keep.
        gc.collect()
        torch.cuda.empty_cache()
    return folder


def model_shape(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    shape = SIZES[size].shape
    if isinstance(shape, str):
        shape = published_shape(shape)
    assert isinstance(shape, dict)
    return dict(shape)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE whose merges are all words of two, three and four letters in order, as many as fit.

    Every id below `vocab_size` is a token, so that no trainer has ids of the head to leave out. Nothing is trained:
    a vocabulary of any size costs no corpus. Ids of words are the largest, from `first_word` on.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the fixed tokens, or larger than all words.
    """
    fixed = [*FIXED, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in product(letters, repeat=2)]
    halves = [(a, b) for a, b in product(letters, repeat=2)]
    halves += [(pair, letter) for pair in pairs for letter in letters]
    # Lazily: there are 456976 words of four letters.
    longer = ((first, second) for first in pairs for second in pairs)
    merges = [*halves, *islice(longer, max(0, vocab_size - len(fixed) - len(halves)))][: vocab_size - len(fixed)]
    if not 0 < vocab_size - len(fixed) == len(merges):
        raise ValueError(
            f"vocab_size={vocab_size} cannot be filled; use more than {len(fixed)} and at most "
            f"{len(fixed) + len(halves) + len(pairs) ** 2}"
        )
    vocab = {token: index for index, token in enumerate([*fixed, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def first_word() -> int:
    """The smallest id of a word; up to the end of the vocabulary every token is lower-case letters only."""
    return len(FIXED) + len(pre_tokenizers.ByteLevel.alphabet())


if __name__ == "__main__":
    sys.exit(main())
