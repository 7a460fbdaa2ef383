"""Single-turn tasks from a file of prompts, graded by a Python function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import model_validator

from spear_fast.errors import TaskError

from .base import Info, StepResult, Tool
from .prompt_rows import PromptRow
from .reward_functions import BUILT_IN, RewardFunction, call_arguments, load_reward, missing_columns
from .row_splits import HeldOutParams, split_rows
from .splits import check_index, check_split
from .threads import Threads

REWARD_THREADS = 16
"""Calls of a sync reward function that run at once. More would only compete for the interpreter."""


class PromptParams(HeldOutParams):
    """The files and the reward."""

    train_file: str
    """Prompts in a .jsonl, .json or .parquet file, in TRL's or verl's columns."""
    reward: str = "exact_match"
    """"exact_match", "numeric_match", "package.module:function" or "path/to/file.py:function". A function of yours
    runs in threads, several calls at once; one that needs the main thread (signals) must be async."""
    success_reward: float = 1.0
    """Reward from which on a prompt counts as solved."""
    system_prompt: str = ""
    """System message for prompts that are plain text; empty for none."""

    @model_validator(mode="after")
    def _one_source_of_eval(self) -> PromptParams:
        self.check_held_out()
        return self


class PromptEnv:
    """One prompt, one completion, one reward."""

    def __init__(self, tasks: PromptTasks) -> None:
        self._tasks = tasks
        self._row: PromptRow | None = None
        self.tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Show prompt `options["index"]` of `options["split"]`: its last user message, and all as info["messages"].

        Raises TaskError if there is no such prompt.
        """
        self._row = self._tasks.row(options["split"], options["index"])
        info = Info()
        if self._row.messages is not None:
            info["messages"] = [dict(message) for message in self._row.messages]
        task_type = self._row.columns.get("ability") or self._row.columns.get("data_source")
        if isinstance(task_type, str):
            info["task_type"] = task_type
        return self._row.text, info

    async def step(self, text: str) -> StepResult:
        """Grade the completion `text` and end the episode. Raises TaskError if the reward function fails."""
        if self._row is None:
            raise TaskError("step was called before reset; reset the environment first")
        reward = await self._grade(self._row, text)
        won = reward >= self._tasks.params.success_reward
        return "", reward, True, False, Info(won=won, action_valid=True, answered=True)

    async def close(self) -> None:
        """Nothing is held."""

    async def _grade(self, row: PromptRow, text: str) -> float:
        name = self._tasks.params.reward
        try:
            reward = float(await self._tasks.call_reward(text, row))
        except Exception as error:
            raise TaskError(f"reward {name!r} failed on {row.place}: {error!r}") from error
        if not math.isfinite(reward):
            raise TaskError(f"reward {name!r} gave {reward} on {row.place}; it must be a finite number")
        return reward


class PromptTasks:
    """The prompts of one or two files in the splits train and eval, which share no prompt."""

    Params = PromptParams

    def __init__(self, params: PromptParams, seed: int) -> None:
        self.name = "prompts"
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = ()
        self.reward: RewardFunction = load_reward(params.reward)
        self._threads = Threads(REWARD_THREADS)
        self._rows = split_rows(params.train_file, params)
        for row in (*self._rows["train"], *self._rows["eval"]):
            _check_columns(row, self.reward, params.reward)

    def size(self, split: str) -> int:
        """Return the number of prompts in `split`. Raises TaskError for an unknown split."""
        check_split(self.name, split, self._sizes)
        return self._sizes[split]

    def make(self) -> PromptEnv:
        """Return a fresh environment."""
        return PromptEnv(self)

    def row(self, split: str, index: int) -> PromptRow:
        """Return a prompt, in the order of the file. Raises TaskError if there is none."""
        check_index(self.name, split, index, self._sizes)
        return self._rows[split][index]

    async def call_reward(self, text: str, row: PromptRow) -> Any:
        """Return the reward of a completion, whatever the user's function takes for one.

        A sync function of the user runs in a thread, so that slow ones hold up neither the engine nor each other.
        """
        call = partial(self.reward, text, **call_arguments(self.reward, row.columns))
        if inspect.iscoroutinefunction(self.reward) or self.params.reward in BUILT_IN:
            result = call()
        else:
            result, error = await self._threads.run(call)
            if error is not None:
                # What is no Exception, SystemExit say, would end the run.
                raise error if isinstance(error, Exception) else TaskError(repr(error))
        return await result if inspect.isawaitable(result) else result

    @property
    def _sizes(self) -> dict[str, int]:
        return {split: len(rows) for split, rows in self._rows.items()}


def _check_columns(row: PromptRow, reward: RewardFunction, name: str) -> None:
    missing = missing_columns(reward, row.columns)
    if missing:
        raise TaskError(
            f"{row.place}: field {missing[0]!r} is missing, reward {name!r} needs it; "
            f"the row has {', '.join(row.columns) or 'no other fields'}"
        )
