"""What the policy is fed before each of its messages: a row that grows, a window of exchanges, or a new row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Messages = Sequence[dict[str, Any]]


class Chat(Protocol):
    """What a history needs of data/chat.py."""

    def prompt(self, messages: Messages) -> list[int]:
        """Tokens of a conversation and of the header of the policy's next message."""
        ...

    def continuation(self, messages: Messages, ended: bool) -> list[int]:
        """Tokens of new messages behind a sampled one."""
        ...

    def rewrites(self, messages: Messages, num_new: int) -> bool:
        """Whether the template shows earlier messages otherwise once the last `num_new` have come."""
        ...


@dataclass(frozen=True)
class HistoryRule:
    """How much of the conversation the policy sees; the fields are those of `RolloutConfig`.

    "full": everything, in one row that only grows. Where the chat template rewrites earlier messages (Qwen3 leaves out
    the thoughts before the last user message), a new row begins with the template's rendering of the conversation.
    "windowed": every message has a row of its own, whose prompt is the opening messages and the last `window`
    exchanges; an exchange is a message of the policy and what answered it, so that the last ends with the present
    observation. Thoughts are left out of remembered messages if `drop_thoughts`.
    """

    mode: Literal["full", "windowed"] = "full"
    window: int = 2
    drop_thoughts: bool = True


FULL = HistoryRule()
"""The whole conversation."""


class Fed(NamedTuple):
    """The tokens to feed next, and whether they begin a new row, e.g. `Fed([5, 6], new_row=False)`."""

    tokens: list[int]
    new_row: bool


class History:
    """The rows of one trajectory as they come to be; rollout and demonstrations both feed what it says."""

    def __init__(self, chat: Chat, rule: HistoryRule) -> None:
        self._chat = chat
        self._rule = rule
        self._num_opening = 0

    def open(self, messages: Messages) -> list[int]:
        """Return the tokens of the first row up to the policy's first message; `messages` open the conversation."""
        self._num_opening = len(messages)
        return self._chat.prompt(messages)

    def follow(self, messages: Messages, num_new: int, ended: bool) -> Fed:
        """Return what to feed before the policy's next message.

        Args:
            messages: The conversation so far; `num_new` answers stand at its end, behind a message of the policy.
            num_new: New messages, at least one.
            ended: Whether the tokens of the policy's last message hold its end-of-turn token.
        """
        if self._rule.mode == "windowed":
            return Fed(self._chat.prompt(self._remembered(messages)), new_row=True)
        if self._chat.rewrites(messages, num_new):
            return Fed(self._chat.prompt(messages), new_row=True)
        return Fed(self._chat.continuation(messages[-num_new:], ended), new_row=False)

    def _remembered(self, messages: Messages) -> Messages:
        opening, rest = messages[: self._num_opening], messages[self._num_opening :]
        spoken = [place for place, message in enumerate(rest) if message["role"] == "assistant"]
        recent = rest[spoken[-self._rule.window :][0] :]
        return [*opening, *(self._as_remembered(message) for message in recent)]

    def _as_remembered(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] != "assistant" or not self._rule.drop_thoughts:
            return message
        return {**message, "content": without_thoughts(message["content"])}


def without_thoughts(text: str) -> str:
    """Return what follows the last thought, as chat templates cut it; a thought that never ends is dropped as well.

    Example: `"<think>wall ahead</think><action>turn</action>"` becomes `"<action>turn</action>"`.
    """
    return text.rsplit("</think>", 1)[-1].split("<think>", 1)[0].strip()
