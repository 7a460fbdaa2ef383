"""What TRL's GRPOTrainer takes, as tasks: tool functions, an environment class, reward functions and prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from spear_fast.errors import ConfigError, TaskError

from ..base import Info, StepResult, Tool
from ..prompt_rows import PromptRow
from ..row_splits import HeldOutParams, split_rows
from ..splits import check_index, check_split
from ..threads import Threads
from ..tool_schema import tool_schema
from .calls import Calls
from .locate import locate
from .recorded_tools import Recording, bound
from .trl_rewards import RewardFunctions, accepted
from .trl_tools import environment_tools, function_tools

MAX_THREADS = 64
"""Calls of sync resets and rewards that run at once in one process."""


class TrlParams(HeldOutParams):
    """Tools, environment and rewards as `package.module:name`, and the prompts."""

    train_file: str
    """Prompts in a .jsonl, .json or .parquet file: `prompt`, and columns for `reset` and the reward functions."""
    tools: list[str] = Field(default=[])
    """Typed functions with Google-style docstrings, sync or async."""
    environment: str | None = None
    """Class, or function without arguments, that makes an environment: `reset(**row)`, public methods as tools, and
    `get_reward()` if it scores itself."""
    rewards: list[str] = Field(default=[])
    """Reward functions `(prompts, completions, **columns) -> list of float or None`, sync or async."""
    reward_weights: list[float] | None = None
    """Weights of `rewards`; None weighs each 1. `get_reward()` always weighs 1."""
    success_reward: float = 1.0
    """Weighted sum of rewards from which on a prompt counts as solved."""
    system_prompt: str = ""
    """System message for prompts that are plain text; empty for none."""

    @model_validator(mode="after")
    def _fits(self) -> TrlParams:
        self.check_held_out()
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"task.params.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards; "
                "give one for each"
            )
        return self


class TrlTasks:
    """Prompts, tools and rewards made for TRL, in the splits train and eval."""

    Params = TrlParams

    def __init__(self, params: TrlParams, seed: int) -> None:
        """Makes one environment, to find its tools.

        Raises ConfigError or TaskError naming what is missing or does not fit.
        """
        self.name = "trl"
        self.params = params
        self.system_prompt = params.system_prompt
        self.threads = Threads(MAX_THREADS)
        self._factory = locate("environment", params.environment) if params.environment else None
        self._idle: list[Any] = []
        self._tools = function_tools(params.tools)
        self._has_reward = False
        if self._factory is not None:
            self._idle.append(self._factory())
            self._tools += environment_tools(self._idle[0], params.environment or "")
            self._has_reward = callable(getattr(self._idle[0], "get_reward", None))
        self.tools: Sequence[Tool] = bound(self._tools, Recording())
        for tool in self.tools:
            tool_schema(tool)
        self._rows = split_rows(params.train_file, params, identity=self._identity)
        self.rewards = RewardFunctions(params.rewards, params.reward_weights)
        if not params.rewards and not self._has_reward:
            raise ConfigError(
                "task.params.rewards is empty: name reward functions, or an environment that has get_reward()"
            )
        for row in (*self._rows["train"], *self._rows["eval"]):
            self.rewards.check(row, has_environment=self._factory is not None)

    def size(self, split: str) -> int:
        """Return the number of prompts in `split`. Raises TaskError for an unknown split."""
        check_split(self.name, split, self._sizes)
        return self._sizes[split]

    def make(self) -> TrlEnv:
        """Return a fresh environment."""
        return TrlEnv(self)

    def row(self, split: str, index: int) -> PromptRow:
        """Return a prompt, in the order of the file. Raises TaskError if there is none."""
        check_index(self.name, split, index, self._sizes)
        return self._rows[split][index]

    def conversation(self, row: PromptRow) -> list[dict[str, Any]] | None:
        """Return the prompt as messages, or None where TRL gives reward functions plain text.

        With tools, TRL takes conversations only, so a plain prompt becomes one.
        """
        if row.messages is not None:
            return [dict(message) for message in row.messages]
        if not self._tools and self._factory is None:
            return None
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": row.text}]

    def take(self) -> Any:
        """Return an environment that no episode uses, None if there is no such class. TRL reuses them as well."""
        if self._factory is None:
            return None
        try:
            return self._idle.pop()
        except IndexError:
            return self._factory()

    def give_back(self, environment: Any) -> None:
        """Let other episodes use an environment."""
        self._idle.append(environment)

    def bound_tools(self, recording: Recording) -> list[Tool]:
        """Return the tools of one episode."""
        return bound(self._tools, recording)

    @property
    def has_own_reward(self) -> bool:
        """Whether the environment scores itself."""
        return self._has_reward

    def _identity(self, row: PromptRow) -> str:
        """With an environment the columns, which `reset` is given, are part of the task."""
        if self._factory is None:
            return row.identity
        return row.identity + json.dumps(row.columns, sort_keys=True, default=str)

    @property
    def _sizes(self) -> dict[str, int]:
        return {split: len(rows) for split, rows in self._rows.items()}


class TrlEnv:
    """One prompt. The first message without a tool call ends the episode and is scored with all before it."""

    def __init__(self, tasks: TrlTasks) -> None:
        self._tasks = tasks
        self._calls = Calls(tasks.threads)
        self._recording = Recording()
        self._row: PromptRow | None = None
        self._prompt: Any = None
        self.tools: Sequence[Tool] = tasks.bound_tools(self._recording)

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Reset the environment with the row and show its prompt, with what `reset` returned at the end.

        Raises TaskError if there is no such prompt, or if `reset` returns something other than text or None.
        """
        row = self._row = self._tasks.row(options["split"], options["index"])
        messages = self._tasks.conversation(row)
        if messages is None:
            self._prompt = row.text
            return row.text, Info()
        self._recording.owner = await self._calls.run(self._tasks.take)
        if self._recording.owner is not None:
            messages[-1]["content"] += await self._observe(row, self._recording.owner.reset)
        self._prompt = messages
        return messages[-1]["content"], Info(messages=messages)

    async def step(self, text: str) -> StepResult:
        """Score the conversation that ends with `text`. Raises TaskError naming the reward function that failed."""
        reward, info = await self._score(text)
        return "", reward, True, False, info | Info(action_valid=True, answered=True)

    async def finish(self, text: str | None) -> tuple[float, Info]:
        """Score the conversation as far as it came, as TRL does. Raises TaskError as `step` does."""
        return await self._score(text)

    async def _score(self, text: str | None) -> tuple[float, Info]:
        """The weighted sum of rewards; `text` is the message that no tool answered, if there is one."""
        if self._row is None:
            raise TaskError("step was called before reset; reset the environment first")
        owner = self._recording.owner
        final = [] if text is None else [{"role": "assistant", "content": text}]
        completion = text or "" if isinstance(self._prompt, str) else [*self._recording.messages, *final]
        columns = dict(self._row.columns) if owner is None else {**self._row.columns, "environments": owner}
        parts = await self._tasks.rewards.scores(self._calls, self._row.place, self._prompt, completion, columns)
        if owner is not None and self._tasks.has_own_reward:
            parts.append((1.0, await self._calls.run(owner.get_reward)))
        reward = _total(parts, self._row.place)
        return reward, Info(won=reward >= self._tasks.params.success_reward)

    async def close(self) -> None:
        """Give the environment back, unless a call that timed out is still inside it."""
        owner, self._recording.owner = self._recording.owner, None
        if owner is not None and not self._calls.is_left and not self._recording.is_busy:
            self._tasks.give_back(owner)

    async def _observe(self, row: PromptRow, reset: Callable[..., Any]) -> str:
        prompt = row.text if row.messages is None else row.messages
        columns = accepted(reset, {"prompt": prompt, **row.columns})
        observation = await self._calls.run(reset, **columns)
        if observation is not None and not isinstance(observation, str):
            raise TaskError(f"reset() of {self._tasks.params.environment} returned {type(observation).__name__}; "
                            "it must return text or None")  # fmt: skip
        return observation or ""


def _total(parts: Sequence[tuple[float, Any]], place: str) -> float:
    """The weighted sum of the scores that are not None, as in TRL."""
    given = [(weight, float(score)) for weight, score in parts if score is not None]
    if not given:
        raise TaskError(f"every reward of {place} is None; at least one must be a number")
    total = sum(weight * score for weight, score in given)
    if not math.isfinite(total):
        raise TaskError(f"the rewards of {place} are {[score for _, score in given]}; they must be finite")
    return total
