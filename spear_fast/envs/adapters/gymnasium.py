"""Gymnasium text environments as tasks: one action in tags per message, the observation as text."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from spear_fast.errors import ConfigError, MissingDependencyError, SpearError, TaskError

from ..base import Info, StepResult, Tool
from ..game import GameParams
from ..splits import check_index, check_split
from ..text import tagged
from ..threads import Threads
from .actions import Actions
from .calls import Calls
from .episode_seeds import episode_seed
from .locate import locate

MAX_THREADS = 64
"""Calls into environments that run at once in one process."""


class GymnasiumParams(GameParams):
    """Which environment, and how its actions and observations are written."""

    id: str
    """Registered id, with `module:` before it if that module registers it, or `package.module:Class`."""
    kwargs: dict[str, Any] = Field(default={})
    """Arguments of the environment."""
    action_names: list[str] | dict[str, int] | None = None
    """Discrete actions: what the policy writes for each, in the order of the space or with their numbers."""
    actions_key: str | None = None
    """Key of the environment's info that lists the commands that are valid now; None where it has none."""
    render_text: str | None = None
    """`package.module:function` that returns the text for `(env, observation, info)`; None takes a text observation."""
    success_key: str | None = None
    """Key of info that says whether the task is solved; None takes a reward above 0 in the step that terminates."""
    expert: str | None = None
    """`package.module:function` that returns the action an expert would write for `(env, observation, info)`."""


class GymnasiumTasks:
    """Episodes of one environment; the seed of its `reset` is the task.

    Each call runs in some thread, no two at once in one environment; it must not depend on which thread that is.
    """

    Params = GymnasiumParams

    def __init__(self, params: GymnasiumParams, seed: int) -> None:
        """Makes and resets one environment, to check its spaces and texts.

        Raises ConfigError naming the parameter that does not fit, MissingDependencyError without gymnasium.
        """
        self.name = "gymnasium"
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = ()
        self.threads = Threads(MAX_THREADS)
        self._seed = seed
        self._render = locate("render_text", params.render_text) if params.render_text else None
        self._expert = locate("expert", params.expert) if params.expert else None
        self._sizes = {"train": params.num_train, "eval": params.num_eval}
        if self._expert is not None:
            self._sizes["demo"] = params.num_demo
        env = self.create()
        try:
            self.actions = Actions(env.action_space, params.action_names, params.actions_key)
            self.text(env, *env.reset(seed=self.seed("eval", 0)))
        except SpearError:
            raise
        except Exception as error:
            raise ConfigError(f"task.params.id={params.id!r}: the environment cannot be reset: {error!r}") from error
        finally:
            env.close()

    def size(self, split: str) -> int:
        """Return the number of tasks in `split`; "demo" exists with an expert. Raises TaskError for an unknown one."""
        check_split(self.name, split, self._sizes)
        return self._sizes[split]

    def make(self) -> GymnasiumEnv:
        """Return a fresh environment."""
        return GymnasiumEnv(self) if self._expert is None else ExpertGymnasiumEnv(self)

    def create(self) -> Any:
        """Return a new environment of gymnasium. Raises ConfigError if it cannot be made."""
        try:
            import gymnasium
        except ImportError as error:
            raise MissingDependencyError("gymnasium", "gymnasium", "task.name=gymnasium") from error
        module, _, name = self.params.id.rpartition(":")
        try:
            if module and name.isidentifier():
                return getattr(importlib.import_module(module), name)(**self.params.kwargs)
            # Its checker holds text against the alphabet of the space, which by default has no space character.
            return gymnasium.make(self.params.id, **{"disable_env_checker": True, **self.params.kwargs})
        except Exception as error:
            raise ConfigError(
                f"task.params.id={self.params.id!r}: the environment cannot be made: {error!r}"
            ) from error

    def seed(self, split: str, index: int) -> int:
        """Return the seed of a task."""
        return episode_seed(split, index, self._seed)

    def check(self, split: str, index: int) -> None:
        """Raise TaskError if there is no such task."""
        check_index(self.name, split, index, self._sizes)

    def text(self, env: Any, observation: Any, info: Mapping[str, Any]) -> str:
        """Return an observation as the policy reads it. Raises ConfigError if it is no text."""
        text = observation if self._render is None else self._render(env, observation, info)
        if not isinstance(text, str):
            raise ConfigError(
                f"task.params.render_text={self.params.render_text!r}: the observation is {type(text).__name__}, not "
                "text; name a function (env, observation, info) -> str"
            )
        return str(text)

    def expert(self, env: Any, observation: Any, info: Mapping[str, Any]) -> str:
        """Return the expert's message."""
        assert self._expert is not None
        return f"<action>{self._expert(env, observation, info)}</action>"


class GymnasiumEnv:
    """One episode. A message without a valid action changes nothing and costs the penalty."""

    def __init__(self, tasks: GymnasiumTasks) -> None:
        self._tasks = tasks
        self._calls = Calls(tasks.threads)
        self._env: Any = None
        self._state: tuple[Any, Mapping[str, Any]] = (None, {})
        self._num_steps = 0
        self._shown = ""
        self.tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start the task whose seed belongs to `options["index"]` of `options["split"]`, which alone decide it.

        Raises TaskError if there is none.
        """
        split, index = options["split"], options["index"]
        self._tasks.check(split, index)
        self._env = await self._calls.run(self._tasks.create)
        text = await self._calls.run(self._reset, self._tasks.seed(split, index))
        self._shown = self._with_actions(text)
        return self._shown, Info(task_type=self._tasks.params.id) | self._seen()

    async def step(self, text: str) -> StepResult:
        """Take the action in `text`. Raises TaskError before reset, and what the environment raises."""
        if self._env is None:
            raise TaskError("step was called before reset; reset the environment first")
        params = self._tasks.params
        self._num_steps += 1
        is_last = self._num_steps >= params.max_steps
        action = self._tasks.actions.parse(tagged(text, "action"), self._state[1])
        if action is None:
            info = Info(won=False, action_valid=False, answered=False) | self._seen()
            return f"Invalid action. {self._shown}", -params.invalid_penalty, False, is_last, info
        shown, reward, terminated, truncated = await self._calls.run(self._step, action)
        won = self._won(reward, terminated)
        if terminated or truncated:
            info = Info(won=won, action_valid=True, answered=True, admissible=[], anchor="over")
            return shown, reward, terminated, truncated, info
        self._shown = self._with_actions(shown)
        return self._shown, reward, False, is_last, Info(won=won, action_valid=True, answered=True) | self._seen()

    async def close(self) -> None:
        """Close the environment, unless a call that timed out is still inside it."""
        if self._env is not None and not self._calls.is_left:
            await self._calls.run(self._env.close)

    def _reset(self, seed: int) -> str:
        observation, info = self._env.reset(seed=seed)
        self._state = (observation, info)
        return self._tasks.text(self._env, observation, info)

    def _step(self, action: Any) -> tuple[str, float, bool, bool]:
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._state = (observation, info)
        return self._tasks.text(self._env, observation, info), float(reward), bool(terminated), bool(truncated)

    def _won(self, reward: float, terminated: bool) -> bool:
        key = self._tasks.params.success_key
        return bool(self._state[1].get(key, False)) if key else terminated and reward > 0

    def _with_actions(self, text: str) -> str:
        names = self._tasks.actions.names(self._state[1])
        return f"{text} Actions: {', '.join(names)}" if names and self._tasks.params.show_actions else text

    def _seen(self) -> Info:
        names = self._tasks.actions.names(self._state[1])
        return Info(anchor=self._shown) if names is None else Info(anchor=self._shown, admissible=names)


class ExpertGymnasiumEnv(GymnasiumEnv):
    """An environment with an expert."""

    def expert(self) -> str:
        """Return the message of the expert in the present state. Raises TaskError before reset."""
        if self._env is None:
            raise TaskError("expert was called before reset; reset the environment first")
        return self._tasks.expert(self._env, *self._state)
