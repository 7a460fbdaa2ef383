"""Text games: what a game is, and the environment and task set that all of them share.

A message of the policy holds one command in `<action>` tags. The observation, the step limit, the penalty of commands
that are not understood, the anchor of step-level advantages and the expert's messages are the same whatever the game.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spear_fast.config.schema import NonNegative, NonNegativeFloat, Positive, Section
from spear_fast.errors import TaskError

from .base import Info, StepResult, Tool
from .splits import Split
from .text import tagged, tagged_message


@dataclass(frozen=True)
class Outcome:
    """What an understood command led to."""

    text: str
    """What the policy reads; the commands that are valid then are added by `GameEnv`."""
    reward: float = 0.0
    won: bool = False
    over: bool = False
    """Whether the game has ended, won or lost."""


class Game(Protocol):
    """One started game: a state that commands change. Everything in it follows from its task, nothing from chance."""

    task_type: str
    """A label for breakdowns of success."""

    def opening(self) -> str:
        """Return the first observation, with the goal in it."""
        ...

    def actions(self) -> list[str]:
        """Return the commands that are valid now, as the policy is shown them."""
        ...

    def act(self, action: str) -> Outcome | None:
        """Carry out a command, in lower case with single spaces; None, and nothing changed, if it is not understood."""
        ...

    def anchor(self) -> str:
        """Return a text of the state the policy sees: equal for the states that step-level advantages shall compare."""
        ...

    def expert(self) -> tuple[str, str]:
        """Return a thought, may be empty, and the command that an expert would give now."""
        ...


class GameParams(Section):
    """What every text game has."""

    max_steps: Positive = 50
    """Messages after which an unfinished game is truncated."""
    invalid_penalty: NonNegativeFloat = 0.1
    """Subtracted from the reward for each message without a valid action."""
    num_train: Positive = 4096
    """Training games."""
    num_eval: NonNegative = 128
    """Held-out games, all different and none of them in the other splits."""
    num_demo: NonNegative = 2048
    """Games for demonstrations, held out from training as well."""
    system_prompt: str = "Act with <action>command</action>."
    """System message; empty for none."""
    show_actions: bool = True
    """List the valid commands in each observation."""


class GameTasks(ABC):
    """A task set of games. A subclass says how many games there are and starts them."""

    def __init__(self, name: str, params: GameParams) -> None:
        self.name = name
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = ()

    @abstractmethod
    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""

    @abstractmethod
    def start(self, split: Split, index: int) -> Game:
        """Return a game at its beginning, the same for the same arguments. Raises TaskError if there is none."""

    def make(self) -> GameEnv:
        """Return a fresh environment."""
        return GameEnv(self)


class GameEnv:
    """One game, one command per message."""

    def __init__(self, tasks: GameTasks) -> None:
        self._tasks = tasks
        self._game: Game | None = None
        self._num_steps = 0
        self._shown = ""
        self.tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start game `options["index"]` of `options["split"]`, which alone decide it.

        Raises TaskError if there is no such game.
        """
        self._game = self._tasks.start(options["split"], options["index"])
        self._num_steps = 0
        shown = self._show(self._game, self._game.opening())
        return shown, Info(admissible=self._game.actions(), anchor=self._game.anchor(), task_type=self._game.task_type)

    async def step(self, text: str) -> StepResult:
        """Carry out the command in `text`; a message without a valid one changes nothing and costs the penalty."""
        game = self._started()
        self._num_steps += 1
        outcome = game.act(" ".join((tagged(text, "action") or "").lower().split()))
        truncated = self._num_steps >= self._tasks.params.max_steps
        if outcome is None:
            info = Info(won=False, action_valid=False, answered=False)
            info |= Info(admissible=game.actions(), anchor=game.anchor())
            return f"Invalid action. {self._shown}", -self._tasks.params.invalid_penalty, False, truncated, info
        # Any valid command counts as an answer: a game lost by its step limit is complete.
        info = Info(won=outcome.won, action_valid=True, answered=True)
        if outcome.over:
            return outcome.text, outcome.reward, True, False, info | Info(admissible=[], anchor="over")
        shown = self._show(game, outcome.text)
        info |= Info(admissible=game.actions(), anchor=game.anchor())
        return shown, outcome.reward, False, truncated, info

    async def close(self) -> None:
        """Nothing is held."""

    def expert(self) -> str:
        """Return the message of an expert in the present state."""
        thought, action = self._started().expert()
        return tagged_message(thought, "action", action) if thought else f"<action>{action}</action>"

    def _show(self, game: Game, text: str) -> str:
        if self._tasks.params.show_actions:
            text = f"{text} Actions: {', '.join(game.actions())}"
        self._shown = text
        return text

    def _started(self) -> Game:
        if self._game is None:
            raise TaskError("the game was used before reset; reset the environment first")
        return self._game
