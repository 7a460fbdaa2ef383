"""What both trainers train on: prompts, the responses that every trajectory is made to give, tools and rewards.

A random model neither calls tools nor ends its messages, and lengths that were sampled would differ. So the tokens of
each message are drawn once; the engines sample as always, and a hook puts the drawn token in place of the sampled one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from bench.common.random_policy import first_word

RENDERED_TOKENS = 24
"""More than the template puts around a message."""
OBSERVATION_WORDS = 12


@dataclass(frozen=True)
class Workload:
    """One kind of step. Lengths are in tokens; everything is drawn from `seed`, once, and the same in every step."""

    kind: Literal["single", "tools", "game"]
    prompts: int
    samples: int
    prompt_words: int
    message: tuple[float, float, int]
    """Median, sigma and largest value of the log-normal length of the free text of a message."""
    turns: tuple[int, int] = (1, 1)
    """Fewest and most messages of a trajectory."""
    latency_s: tuple[float, float] = (0.0, 0.0)
    """Mean and largest value of the exponential latency of a tool call."""
    at_maximum: int = 0
    """Trajectories whose length is the largest, beside those drawn so."""
    seed: int = 0

    @property
    def trajectories(self) -> int:
        """Trajectories of a step."""
        return self.prompts * self.samples


WORKLOADS: dict[str, dict[str, Workload]] = {
    "tiny": {
        "long-tail": Workload("single", 2, 2, 4, (6, 0.8, 24), at_maximum=1),
        "tools": Workload("tools", 2, 2, 4, (3, 0.5, 8), turns=(1, 3), latency_s=(0.002, 0.01)),
        "game": Workload("game", 2, 2, 4, (2, 0.5, 4), turns=(2, 4)),
    },
    "cpu": {
        "long-tail": Workload("single", 2, 6, 16, (32, 1.0, 160), at_maximum=1),
        "tools": Workload("tools", 2, 6, 16, (12, 0.7, 48), turns=(1, 4), latency_s=(0.03, 0.3)),
        "game": Workload("game", 2, 6, 16, (3, 0.5, 8), turns=(2, 6)),
    },
    "qwen2.5-1.5b": {
        "long-tail": Workload("single", 16, 8, 128, (300, 1.0, 2048), at_maximum=2),
        "tools": Workload("tools", 16, 8, 128, (128, 0.7, 512), turns=(1, 5), latency_s=(0.3, 3.0)),
        "game": Workload("game", 16, 8, 128, (12, 0.5, 48), turns=(10, 30)),
    },
}
"""Workloads by size of the model and name: one answer of long-tailed length; tools that take their time, some messages
with two calls and the last one with none; many short messages to a world that answers at once."""


class Script:
    """The drawn prompts, messages and tool results of a workload, in a model's tokens."""

    def __init__(self, workload: Workload, tokenizer: PreTrainedTokenizerBase) -> None:
        self.workload = workload
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(workload.seed)
        self._words = (first_word(), len(tokenizer))
        self.latencies: dict[str, float] = {}
        """Seconds that the tool takes for a key."""
        self.prompts = [self._prompt(index) for index in range(workload.prompts)]
        """Opening messages by prompt."""
        self.turns = [[self._trajectory() for _ in range(workload.samples)] for _ in range(workload.prompts)]
        """Tokens of each message by prompt, sample and turn."""
        for place in range(workload.at_maximum):
            self.turns[place % workload.prompts][0] = [self._message(workload.message[2])]

    @property
    def most_turns(self) -> int:
        """Messages of the longest trajectory."""
        return max(len(turns) for group in self.turns for turns in group)

    @property
    def longest_message(self) -> int:
        """Tokens of the longest message."""
        return max(len(turn) for group in self.turns for turns in group for turn in turns)

    @property
    def action_tokens(self) -> int:
        """Tokens of all messages: what a step trains on."""
        return sum(len(turn) for group in self.turns for turns in group for turn in turns)

    def digest(self) -> str:
        """SHA-256 over the tokens that a step trains on, by prompt and sample."""
        return _hash(
            [prompt, sample, [token for turn in turns for token in turn]]
            for prompt, group in enumerate(self.turns)
            for sample, turns in enumerate(group)
        )

    def longest(self) -> int:
        """No trajectory has more tokens, prompt and observations included."""
        answer = max(len(self._tokenizer.encode(words_of(str(key)))) for key in range(64)) + RENDERED_TOKENS
        prompt = max(sum(len(self._encode(m["content"])) + RENDERED_TOKENS for m in each) for each in self.prompts)
        rest = (sum(len(turn) + 2 * answer for turn in turns) for group in self.turns for turns in group)
        return prompt + max(rest)

    def describe(self) -> dict[str, Any]:
        """What the results say of it."""
        lengths = sorted(sum(map(len, turns)) for group in self.turns for turns in group)
        return {
            **asdict(self.workload),
            "action_tokens": self.action_tokens,
            "action_tokens_by_trajectory": lengths,
            "messages": sum(len(turns) for group in self.turns for turns in group),
            "tool_calls": len(self.latencies),
            "tool_seconds_if_one_by_one": sum(self.latencies.values()),
        }

    def lookup(self) -> Callable[..., Any]:
        """The tool of the "tools" workload, the same function for both trainers."""
        latencies = self.latencies

        async def lookup(key: str) -> str:
            """Look up what is stored under a key.

            Args:
                key: A word.

            Returns:
                What is stored.
            """
            await asyncio.sleep(latencies[key])
            return words_of(key)

        return lookup

    def _prompt(self, index: int) -> list[dict[str, str]]:
        word = (self._text(1) for _ in range(self.workload.prompt_words))
        return [
            {"role": "system", "content": "Answer in words. Call lookup or act as you need."},
            {"role": "user", "content": f"{index}: " + " ".join(word)},
        ]

    def _trajectory(self) -> list[list[int]]:
        median, sigma, largest = self.workload.message
        turns = int(self._rng.integers(self.workload.turns[0], self.workload.turns[1], endpoint=True))
        lengths = np.exp(self._rng.normal(np.log(median), sigma, turns)).clip(1, largest).astype(int)
        return [self._message(length, calls=turn + 1 < turns) for turn, length in enumerate(lengths)]

    def _message(self, length: int, calls: bool = False) -> list[int]:
        """`length` tokens of words, the last of them the end of the turn; tool calls come before it."""
        words = self._rng.integers(*self._words, size=max(1, length - 1)).tolist()
        return [*words, *(self._encode(self._calls()) if calls else []), int(str(self._tokenizer.eos_token_id))]

    def _calls(self) -> str:
        if self.workload.kind == "game":
            return call_text("act", {"move": str(self._rng.choice(("north", "south", "east", "west")))})
        mean, largest = self.workload.latency_s
        keys = [f"{self._text(1)}{len(self.latencies) + n:03d}" for n in range(int(self._rng.integers(1, 3)))]
        self.latencies |= {key: float(min(self._rng.exponential(mean), largest)) for key in keys}
        return "".join(call_text("lookup", {"key": key}) for key in keys)

    def _text(self, tokens: int) -> str:
        return str(self._tokenizer.decode(self._rng.integers(*self._words, size=tokens).tolist()))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class World:
    """The game: a state that every move changes, and a text that describes it."""

    def __init__(self, task: int) -> None:
        self.state = task

    def move(self, direction: str) -> str:
        """Take a step and return what is seen there."""
        self.state = zlib.crc32(f"{self.state}{direction}".encode()) % 997
        return words_of(str(self.state))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as both trainers read it."""
    return f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def words_of(key: str) -> str:
    """A short text that depends on the key only."""
    draws = np.random.default_rng(zlib.crc32(key.encode()))
    letters = draws.integers(ord("a"), ord("z"), size=(OBSERVATION_WORDS, 4), endpoint=True, dtype=np.uint8)
    return " ".join(bytes(word).decode() for word in letters)


def reward_of(text: str) -> float:
    """A reward between 0 and 1 by the letters of the last message, so that it differs within each group."""
    return zlib.crc32("".join(filter(str.isalpha, text)).encode()) % 1000 / 999


@dataclass(frozen=True)
class TrainedRow:
    """One sequence that a trainer has learnt from."""

    prompt: int
    sample: int
    tokens: Sequence[int]
    """Prompt, messages and observations."""
    mask: Sequence[bool]
    """True on the tokens that enter the loss."""
    advantage: float


def digest(rows: Iterable[TrainedRow]) -> str:
    """SHA-256 over places, tokens and masks of the rows, whatever their order."""
    return _hash([row.prompt, row.sample, list(row.tokens), [int(bit) for bit in row.mask]] for row in rows)


def digest_of_actions(rows: Iterable[TrainedRow]) -> str:
    """What `Script.digest` is if the rows' loss is that of the script's messages and of nothing else."""
    return _hash(
        [row.prompt, row.sample, [token for token, kept in zip(row.tokens, row.mask, strict=True) if kept]]
        for row in rows
    )


def _hash(places: Iterable[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(sorted(places)).encode()).hexdigest()
