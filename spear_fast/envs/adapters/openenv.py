"""OpenEnv environments as tasks, through their clients: one action per message, one session per episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from spear_fast.config.section import NonNegative, NonNegativeFloat, Positive, Section
from spear_fast.errors import ConfigError, MissingDependencyError, TaskError

from ..base import Info, StepResult, Tool
from ..splits import check_index, check_split
from ..text import tagged
from ..threads import Threads
from .calls import Calls
from .episode_seeds import episode_seed
from .locate import locate
from .sessions import Sessions

REFUSED = "(code: VALIDATION_ERROR)"
"""What the client's error says when the server could not read an action."""


class OpenEnvParams(Section):
    """Where the server is, and how actions and observations are written."""

    url: str
    """Address of the server, "http://host:port" or "ws://host:port"."""
    client: str = "openenv.core:GenericEnvClient"
    """Class of the client, as `package.module:Class`, with async or sync `reset`, `step` and `close`."""
    client_kwargs: dict[str, Any] = Field(default={})
    """Further arguments of the client."""
    action: str | None = None
    """Class of the action, as `package.module:Class`; None sends plain fields, as GenericEnvClient takes them."""
    action_format: Literal["tag", "message", "json"] = "tag"
    """What becomes the action: "tag" the text in the last `<action>` tag, "message" the whole message, "json" the
    object in the tag, which gives all fields."""
    action_field: str = "message"
    """Field of the action that takes the text."""
    observation_field: str | None = None
    """Field of the observation that is its text."""
    render_text: str | None = None
    """Instead: `package.module:function` that returns the text of an observation."""
    reset_kwargs: dict[str, Any] = Field(default={})
    """Further arguments of `reset`."""
    seeded: bool = True
    """Give `reset` the task's seed. Without, the trajectories of a group start wherever the server puts them."""
    sessions: Positive = 64
    """Episodes at once on one rank. All ranks together must stay within the server's `max_concurrent_envs`."""
    success_reward: float = 1.0
    """Reward of the last step from which on a task counts as solved."""
    max_steps: Positive = 50
    """Messages after which an unfinished episode is truncated."""
    invalid_penalty: NonNegativeFloat = 0.1
    """Subtracted from the reward for each message without a valid action."""
    num_train: Positive = 4096
    """Seeds for training."""
    num_eval: NonNegative = 128
    """Held-out seeds."""
    system_prompt: str = "Act with <action>command</action>."
    """System message; empty for none."""


class OpenEnvTasks:
    """Episodes on an OpenEnv server; the seed given to `reset` is the task."""

    Params = OpenEnvParams

    def __init__(self, params: OpenEnvParams, seed: int) -> None:
        """Imports the client, which takes seconds; the server is first asked by an episode.

        Raises ConfigError naming what is missing, MissingDependencyError without openenv-core.
        """
        try:
            import openenv.core  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingDependencyError("openenv-core", "openenv", "task.name=openenv") from error
        if (params.observation_field is None) == (params.render_text is None):
            raise ConfigError("set either task.params.observation_field or task.params.render_text, and only one")
        self.name = "openenv"
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = ()
        self.threads = Threads(params.sessions)
        self.sessions = Sessions(params.sessions)
        self._seed = seed
        self._client = locate("client", params.client)
        self._action = locate("action", params.action) if params.action else None
        self._render = locate("render_text", params.render_text) if params.render_text else None
        self._sizes = {"train": params.num_train, "eval": params.num_eval}

    def size(self, split: str) -> int:
        """Return the number of tasks in `split`. Raises TaskError for an unknown one."""
        check_split(self.name, split, self._sizes)
        return self._sizes[split]

    def make(self) -> OpenEnvEnv:
        """Return a fresh environment."""
        return OpenEnvEnv(self)

    def connect(self) -> Any:
        """Return a client of its own session."""
        return self._client(base_url=self.params.url, **self.params.client_kwargs)

    def reset_arguments(self, split: str, index: int) -> dict[str, Any]:
        """Return the arguments of `reset` for a task. Raises TaskError if there is none."""
        check_index(self.name, split, index, self._sizes)
        seed = {"seed": episode_seed(split, index, self._seed)} if self.params.seeded else {}
        return {**seed, **self.params.reset_kwargs}

    def action(self, text: str) -> tuple[Any, str]:
        """Return the action in a message and "", or None and why there is none."""
        content = text if self.params.action_format == "message" else tagged(text, "action")
        if content is None:
            return None, "there is no <action> tag"
        fields: Any = {self.params.action_field: content}
        if self.params.action_format == "json":
            try:
                fields = json.loads(content)
            except (ValueError, RecursionError):
                return None, "the action is not valid JSON"
            if not isinstance(fields, dict):
                return None, "the action is not a JSON object"
        if self._action is None:
            return fields, ""
        try:
            return self._action(**fields), ""
        except ValidationError as error:
            return None, "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())

    def text(self, observation: Any) -> str:
        """Return an observation as the policy reads it. Raises TaskError if it is no text."""
        field = self.params.observation_field
        if self._render is not None:
            text = self._render(observation)
        elif isinstance(observation, Mapping):
            text = observation.get(str(field))
        else:
            text = getattr(observation, str(field), None)
        if not isinstance(text, str):
            raise TaskError(
                f"task.params.observation_field={field!r} (or render_text) gives {type(text).__name__}, not text, for "
                f"the observation {str(observation)[:200]}"
            )
        return text


class OpenEnvEnv:
    """One session. A message without an action that the server can read changes nothing and costs the penalty."""

    def __init__(self, tasks: OpenEnvTasks) -> None:
        self._tasks = tasks
        self._calls = Calls(tasks.threads)
        self._client: Any = None
        self._holds_session = False
        self._num_steps = 0
        self._shown = ""
        self.tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Open a session and start the task `options["index"]` of `options["split"]`.

        Waits for a free session, which counts towards no time limit. Raises TaskError if there is no such task, and
        what the client raises.
        """
        arguments = self._tasks.reset_arguments(options["split"], options["index"])
        await self._tasks.sessions.take()
        self._holds_session = True
        self._client = self._tasks.connect()
        result = await self._calls.run(self._client.reset, **arguments)
        self._shown = self._tasks.text(result.observation)
        return self._shown, Info()

    async def step(self, text: str) -> StepResult:
        """Send the action in `text`. Raises TaskError before reset, and what the client raises."""
        if self._client is None:
            raise TaskError("step was called before reset; reset the environment first")
        params = self._tasks.params
        self._num_steps += 1
        is_last = self._num_steps >= params.max_steps
        action, problem = self._tasks.action(text)
        if action is None:
            return self._invalid(problem, is_last)
        try:
            result = await self._calls.run(self._client.step, action)
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise
            return self._invalid(str(error), is_last)
        reward = float(result.reward or 0.0)
        won = bool(result.done) and reward >= params.success_reward
        shown = self._tasks.text(result.observation)
        self._shown = shown
        info = Info(won=won, action_valid=True, answered=True)
        return shown, reward, bool(result.done), is_last and not result.done, info

    async def close(self) -> None:
        """Close the session, unless a call that timed out is still inside it."""
        try:
            if self._client is not None and not self._calls.is_left:
                await self._calls.run(self._client.close)
        finally:
            if self._holds_session:
                self._holds_session = False
                self._tasks.sessions.give_back()

    def _invalid(self, problem: str, is_last: bool) -> StepResult:
        info = Info(won=False, action_valid=False, answered=False, anchor=self._shown)
        text = f"Invalid action: {problem}. {self._shown}"
        return text, -self._tasks.params.invalid_penalty, False, is_last, info
