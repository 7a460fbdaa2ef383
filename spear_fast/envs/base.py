"""What an environment and a task set are: the protocols that rollout/ and data/ rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable


class Info(TypedDict, total=False):
    """What reset and step tell beside the text. Every key may be absent."""

    admissible: list[str]
    """Commands that are valid now."""
    won: bool
    """Whether the task is solved; decides `Trajectory.success`."""
    action_valid: bool
    """Whether the environment understood the last action. Default True."""
    anchor: str
    """The state now shown, for GiGPO. Default: the observation text."""
    answered: bool
    """Whether the message just taken was a final answer or, in games, an understood command. Default: terminated."""
    messages: list[dict[str, Any]]
    """From reset only: the whole opening conversation, in place of system prompt and observation."""
    task_type: str
    """A label for breakdowns of success."""


StepResult = tuple[str, float, bool, bool, Info]
"""(observation, reward, terminated, truncated, info), in Gymnasium's order."""

Tool = Callable[..., Any]
"""A typed function, sync or async, with a Google-style docstring; it returns what the model shall read."""


@runtime_checkable
class Environment(Protocol):
    """One episode of one task. Made for a single trajectory, then closed.

    A message of the policy that holds tool calls is answered by `tools`; any other message goes to `step`.
    """

    tools: Sequence[Tool]

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start the task `options["index"]` of split `options["split"]`; return the first observation."""
        ...

    async def step(self, text: str) -> StepResult:
        """Take one message of the policy and return what follows."""
        ...

    async def close(self) -> None:
        """Free what reset took. Called once, also after an error."""
        ...


@runtime_checkable
class Finishable(Protocol):
    """An environment that also scores an episode which a limit of turns or tokens ended before it could itself.

    Without it what was earned until then stands, which where a wrong answer is worth less than 0 would pay for never
    answering.
    """

    async def finish(self, text: str | None) -> tuple[float, Info]:
        """Return a last reward, and in the info `won` and `answered`.

        Args:
            text: The message of the policy that a limit of tokens cut; None if every message was answered.
        """
        ...


@runtime_checkable
class Demonstrator(Protocol):
    """An environment that can also show how it is solved, for the cold start."""

    def expert(self) -> str:
        """Return the message an expert would write in the present state."""
        ...


@runtime_checkable
class TaskSet(Protocol):
    """A family of tasks: how many there are, and a fresh environment for each trajectory."""

    name: str
    system_prompt: str
    """Shown as the system message; empty for none."""
    tools: Sequence[Tool]
    """The tools whose schemas the chat template shows."""

    def size(self, split: str) -> int:
        """Return the number of tasks in `split`: "train", "eval" or, where there are demonstrations, "demo".

        Raises TaskError for a split that the set does not have.
        """
        ...

    def make(self) -> Environment:
        """Return a fresh environment."""
        ...


@runtime_checkable
class Closable(Protocol):
    """A task set that holds something for all its environments, a sandbox say."""

    def close(self) -> None:
        """Free it. Called once, when the run is over, outside of any event loop."""
        ...


@runtime_checkable
class GameWriter(Protocol):
    """A task set class that can make the files of new games, for itself to play; `Params` are its parameters."""

    @classmethod
    def write_games(cls, params: Any, *, count: int, seed: int, out: Path) -> list[str]:
        """Write `count` games of each split below the folder `out`, the same for the same seed.

        Returns lines to print: what was made, and how it is used. Raises TaskError if `out` cannot be used.
        """
        ...
