"""A small byte-level BPE tokenizer in ChatML dress, trained on given texts, for models built at random."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "<action>",
    "</action>",
)

# Tools are shown as one signature a line: a JSON schema would cost a tiny model most of its context.
CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] -%}
{{ '\\n' ~ tool.function.name }}({{ tool.function.parameters.properties.keys() | join(', ') }})
{%- endfor -%}<|im_end|>
{% endif -%}
{%- for message in messages if message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens; digits stay single tokens.

    Args:
        texts: What the model will read and write, as plain text; special tokens may occur in it.
        vocab_size: Upper limit, the 256 bytes and the special and markup tokens included.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes and the fixed tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"model.init.vocab_size={vocab_size} is too small; use at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_without_markup(text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _without_markup(text: str) -> str:
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        text = text.replace(token, "\n")
    return text
