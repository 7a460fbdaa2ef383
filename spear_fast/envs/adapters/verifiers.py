"""Tasksets of verifiers (its v1 interface) as tasks: their prompts, tools and rewards around our own rollout."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from spear_fast.config.section import NonNegative, Positive, Section
from spear_fast.errors import ConfigError, MissingDependencyError, TaskError

from ..base import Info, StepResult, Tool
from ..splits import check_index, check_split
from ..tool_schema import tool_schema
from .locate import locate
from .recorded_tools import Recording, bound
from .verifiers_tools import Toolsets
from .verifiers_trace import content_text, record_turns, start_trace


class VerifiersParams(Section):
    """Which taskset, and how many of its tasks."""

    taskset: str
    """Id of an installed taskset package, or `package.module:Class`."""
    config: dict[str, Any] = Field(default={})
    """Fields of the taskset's config."""
    num_eval: NonNegative = 128
    """Held-out tasks: the first that the taskset loads."""
    num_train: Positive | None = None
    """Training tasks: those that follow; None takes all the rest, which an infinite taskset has no end of."""
    success_reward: float = 1.0
    """Weighted sum of rewards from which on a task counts as solved."""


class VerifiersTasks:
    """Tasks of one taskset, for one agent: no harness, runtime or model client of verifiers takes part."""

    Params = VerifiersParams

    def __init__(self, params: VerifiersParams, seed: int) -> None:
        """Loads the tasks.

        Raises ConfigError naming what is missing or what of verifiers the adapter does not do, TaskError for tasks
        without a text prompt or in both splits, MissingDependencyError without verifiers.
        """
        self.name = "verifiers"
        self.params = params
        self.system_prompt = ""
        taskset = _load(params)
        self._toolsets = Toolsets(taskset)
        self.tools: Sequence[Tool] = bound(self._toolsets.tools, Recording())
        for tool in self.tools:
            tool_schema(tool)
        end = None if params.num_train is None else params.num_eval + params.num_train
        if end is None and not taskset.bounded:
            raise ConfigError("task.params.num_train is missing: the taskset is infinite; say how many tasks to take")
        tasks = list(itertools.islice(taskset, end))
        self._tasks = {"train": tasks[params.num_eval :], "eval": tasks[: params.num_eval]}
        if not self._tasks["train"]:
            raise ConfigError(
                f"task.params.num_eval={params.num_eval} leaves no task for training: the taskset has {len(tasks)}; "
                "lower it"
            )
        for task in tasks:
            _check(task)
        self._check_disjoint()

    def size(self, split: str) -> int:
        """Return the number of tasks in `split`. Raises TaskError for an unknown split."""
        check_split(self.name, split, self._sizes)
        return self._sizes[split]

    def make(self) -> VerifiersEnv:
        """Return a fresh environment."""
        return VerifiersEnv(self, self._toolsets)

    def task(self, split: str, index: int) -> Any:
        """Return a task of verifiers, in the order of the taskset. Raises TaskError if there is none."""
        check_index(self.name, split, index, self._sizes)
        return self._tasks[split][index]

    def _check_disjoint(self) -> None:
        held_out = {_identity(task) for task in self._tasks["eval"]}
        shared = [task for task in self._tasks["train"] if _identity(task) in held_out]
        if shared:
            raise TaskError(
                f"{len(shared)} tasks of {self.params.taskset} are both among the first task.params.num_eval="
                f"{self.params.num_eval} and behind them, the first at {shared[0].data.idx}; remove them from one"
            )

    @property
    def _sizes(self) -> dict[str, int]:
        return {split: len(tasks) for split, tasks in self._tasks.items()}


class VerifiersEnv:
    """One task. The first message without a tool call ends the episode and is scored with all before it."""

    def __init__(self, tasks: VerifiersTasks, toolsets: Toolsets) -> None:
        self._tasks = tasks
        self._toolsets = toolsets
        self._recording = Recording()
        self._task: Any = None
        self._trace: Any = None
        self._prompt: list[dict[str, Any]] = []
        self.tools: Sequence[Tool] = bound(toolsets.tools, self._recording)

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Set the task and its tools up and show its prompt. Raises TaskError if there is no such task."""
        self._task = self._tasks.task(options["split"], options["index"])
        self._recording.owner = await self._toolsets.start(self._task)
        self._trace = start_trace(self._task, self._toolsets.state(self._recording.owner, self._task))
        await self._task.setup(self._trace, _NO_RUNTIME)
        self._prompt = _messages(self._task)
        return self._prompt[-1]["content"], Info(messages=[dict(message) for message in self._prompt])

    async def step(self, text: str) -> StepResult:
        """Score the conversation that ends with `text`. Raises what the task's hooks and rewards raise."""
        reward, info = await self._score(text, "agent_completed")
        return "", reward, True, False, info | Info(action_valid=True, answered=True)

    async def finish(self, text: str | None) -> tuple[float, Info]:
        """Score the conversation as far as it came. Raises what `step` raises."""
        return await self._score(text, "max_turns")

    async def _score(self, text: str | None, ended_by: str) -> tuple[float, Info]:
        if self._trace is None:
            raise TaskError("step was called before reset; reset the environment first")
        final = [] if text is None else [{"role": "assistant", "content": text}]
        record_turns(self._trace, self._prompt, [*self._recording.messages, *final])
        self._trace.stop(ended_by)
        await self._task.finalize(self._trace, _NO_RUNTIME)
        await self._task.score(self._trace)
        reward = float(self._trace.reward)
        if not math.isfinite(reward):
            raise TaskError(f"task {self._task.data.idx} of {self._tasks.params.taskset} has the reward {reward}")
        return reward, Info(won=reward >= self._tasks.params.success_reward)

    async def close(self) -> None:
        """Nothing is held."""


class _NoRuntime:
    """Stands where verifiers passes a runtime; a task that makes use of it fails with the reason."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TaskError(f"the task uses runtime.{name}; tasks that need a runtime of verifiers are not supported")


_NO_RUNTIME = _NoRuntime()


def _load(params: VerifiersParams) -> Any:
    try:
        import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
        from verifiers.v1.utils.generic import concrete_type  # pyright: ignore[reportMissingImports]
        from verifiers.v1.utils.loaders import taskset_class  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("verifiers", "verifiers", "task.name=verifiers") from error
    try:
        kind = locate("taskset", params.taskset) if ":" in params.taskset else taskset_class(params.taskset)
        config = concrete_type(kind, vf.TasksetConfig, origin=vf.Taskset) or vf.TasksetConfig
        return kind(config.model_validate(params.config))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"task.params.taskset={params.taskset!r} cannot be loaded: {error}") from error


def _check(task: Any) -> None:
    """Raise an error for a task with parts that only verifiers' own rollout runs."""
    place = f"task {task.data.idx} of {type(task).__name__}"
    hooks = [*task.hooks("stop"), *_intercepts(task)]
    if hooks:
        raise ConfigError(
            f"task.params.taskset: {place} has the hook {hooks[0].__name__}; stop and intercept hooks act inside "
            "verifiers' rollout and are not supported"
        )
    scores = [*task.hooks("metric"), *task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    for score in scores:
        runtime = inspect.signature(score).parameters.get("runtime")
        if runtime is not None and runtime.default is runtime.empty:
            raise ConfigError(
                f"task.params.taskset: {score.__name__} of {place} needs a runtime, which is not supported"
            )
    if task.NEEDS_CONTAINER or task.data.image is not None:
        raise ConfigError(f"task.params.taskset: {place} needs a container, which the adapter does not start")
    _messages(task)


def _intercepts(task: Any) -> list[Any]:
    from verifiers.v1.utils.decorators import discover_decorated  # pyright: ignore[reportMissingImports]

    return discover_decorated(task, "intercept")


def _messages(task: Any) -> list[dict[str, Any]]:
    """The prompt as messages. Raises TaskError unless it ends with a user's text."""
    data = task.data
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    messages = [{"role": message.role, "content": content_text(message)} for message in data.prompt or []]
    if not messages or messages[-1]["role"] != "user":
        raise TaskError(f"task {data.idx} of {type(task).__name__}: the prompt does not end with a user's message")
    return [*system, *messages]


def _identity(task: Any) -> str:
    """What makes two tasks the same: everything but their place."""
    return json.dumps(task.data.model_dump(mode="json", exclude={"idx"}), sort_keys=True)
