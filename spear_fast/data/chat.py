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

    A row is built append-only: `prompt` once, then sampled tokens as they came, then `continuation` for each tool
    result or observation, as long as the template does not show earlier messages otherwise (`rewrites`). Special tokens
    inside environment text are defused, so that a tool cannot end a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]] = (),
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: With a chat template and an `eos_token`.
            tools: OpenAI function schemas shown to the model.
            extra_stop_ids: Further tokens that end a message, e.g. those of the model's generation config.

        Raises:
            TaskError: The tokenizer has no end-of-turn token.
        """
        if tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no eos_token, so a message could never end; set one and save it")
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        """Tokens that mean something; a model may have more rows, as padding, which must never be sampled."""
        self._tools: list[Any] | None = list(tools) or None
        self._special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
        eos = int(str(tokenizer.eos_token_id))
        self.end_of_turn = self._find_end_of_turn(eos)
        """The token that the template puts behind a message of the policy."""
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self.end_of_turn, eos, *extra_stop_ids]))
        self._may_rewrite = self._rewrites_in_a_trial()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the opening messages and the header of the policy's first message."""
        return self._encode(self._render([self._defused(message) for message in messages]))

    def continuation(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Return the tokens between a sampled message and the policy's next one.

        Args:
            messages: The new messages, e.g. one tool result.
            ended: Whether the sampled message holds its end-of-turn token; if not, it is added here.
        """
        tokens = self._encode(self._after_message([self._defused(message) for message in messages]))
        return tokens[1:] if ended and tokens[:1] == [self.end_of_turn] else tokens

    def rewrites(self, messages: Sequence[Message], num_new: int) -> bool:
        """Return whether the template shows earlier messages otherwise now that the last `num_new` have come.

        Before those stands a message of the policy. Compared are the rendering of `messages` and that of what came
        before the policy's message, followed by its text and the rendering of the new messages. White space does not
        count: the policy keeps seeing what it wrote.
        """
        return self._may_rewrite and self._differs(messages, num_new)

    def message(self, text: str) -> list[int]:
        """Return the tokens of a message as the policy would have written it, end-of-turn token included."""
        return [*self._encode(text), self.end_of_turn]

    def decode(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of sampled tokens without special tokens, and whether all of it was valid UTF-8."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return text, "\ufffd" not in text

    def _after_message(self, messages: Sequence[Message]) -> str:
        """What the template writes behind a message of the policy that `messages` follow."""
        opening = [{"role": "user", "content": "."}, {"role": "assistant", "content": _SENTINEL}]
        return self._render([*opening, *messages]).split(_SENTINEL, 1)[1]

    def _differs(self, messages: Sequence[Message], num_new: int) -> bool:
        shown = [self._defused(message) for message in messages]
        before, spoken, new = shown[: -num_new - 1], shown[-num_new - 1], shown[-num_new:]
        appended = self._render(before) + spoken["content"] + self._after_message(new)
        return "".join(appended.split()) != "".join(self._render(shown).split())

    def _rewrites_in_a_trial(self) -> bool:
        """Whether a conversation with thoughts is rewritten anywhere; most templates never do, and are asked once."""
        roles = ["user", "tool"] if self._tools else ["user"]
        for role in roles:
            messages = [{"role": "user", "content": "0"}]
            for number in "123":
                spoken = {"role": "assistant", "content": f"<think>\n{number}a\n</think>\n\n{number}b"}
                messages += [spoken, {"role": role, "content": f"{number}c"}]
                if self._differs(messages, 1):
                    return True
        return False

    def _find_end_of_turn(self, eos: int) -> int:
        """Base models often have another `eos_token` than the one that ends a turn in their template."""
        behind = self._encode(self._after_message([{"role": "user", "content": "."}]))
        added: dict[str, int] = self.tokenizer.get_added_vocab()  # type: ignore[operator]
        return behind[0] if behind and behind[0] in added.values() else eos

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
