"""Between messages and tokens: renders only what is new, and never tokenises sampled text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spear_fast.errors import TaskError

_SENTINEL = "\u2402sampled\u2403"

Message = Mapping[str, Any]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local model folder.

    Raises:
        TaskError: The folder holds no tokenizer, or the tokenizer has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise TaskError(f"model.path={str(path)!r} holds no tokenizer that transformers can load: {error}") from error
    if not tokenizer.chat_template:
        raise TaskError(f"the tokenizer in model.path={str(path)!r} has no chat template; save one with it")
    return tokenizer


class Chat:
    """Renders messages with the tokenizer's chat template.

    A trajectory is built append-only: `prompt` once, then sampled tokens as they came, then `continuation` for each
    tool result or observation. Special tokens inside environment text are defused, so that a tool cannot end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()) -> None:
        """
        Args:
            tokenizer: With a chat template and an end-of-turn token (`eos_token`).
            tools: OpenAI function schemas shown to the model.

        Raises:
            TaskError: The tokenizer has no end-of-turn token.
        """
        if tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no eos_token, so a message could never end; set one and save it")
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (int(str(tokenizer.eos_token_id)),)
        self._tools: list[Any] | None = list(tools) or None
        self._special = [token for token in tokenizer.all_special_tokens if len(token) > 1]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the opening messages and the header of the policy's first message."""
        return self._encode(self._render([self._defused(message) for message in messages]))

    def continuation(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Return the tokens between a sampled message and the policy's next one.

        Args:
            messages: The new messages, e.g. one tool result.
            ended: Whether the sampled message holds its end-of-turn token; if not, it is added here.
        """
        opening = [{"role": "user", "content": "."}, {"role": "assistant", "content": _SENTINEL}]
        text = self._render([*opening, *(self._defused(message) for message in messages)])
        rest = text.split(_SENTINEL, 1)[1]
        eos = str(self.tokenizer.eos_token)
        return self._encode(rest.removeprefix(eos) if ended else rest)

    def message(self, text: str) -> list[int]:
        """Return the tokens of a message as the policy would have written it, end-of-turn token included."""
        return [*self._encode(text), self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of sampled tokens without special tokens, and whether all of it was valid UTF-8."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return text, "\ufffd" not in text

    def _render(self, messages: Sequence[Message]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=self._tools, tokenize=False, add_generation_prompt=True
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _defused(self, message: Message) -> dict[str, Any]:
        content = str(message["content"])
        for token in self._special:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return {**message, "content": content}
