"""A game on the fast engine, as the environment of all text games plays it."""

from __future__ import annotations

from spear_fast.envs.game import Outcome
from spear_fast.errors import TaskError

from .engine import Engine, check_domain
from .expert import advise
from .game_files import GameText
from .wording import wording

UNLISTED = "help"
"""A command that is understood but not offered, as in the published set-ups."""
MOST_EXPERT_STEPS = 50
"""Steps after which the expert has failed."""


class FastGame:
    """One game. Reward 1 for reaching the goal.

    The anchor is the text that the last understood command led to, as in GiGPO's own set-up. A state that is seen twice
    by different commands ("go to" and "examine") has two anchors, and what the text does not tell, as what is carried,
    does not part them.
    """

    def __init__(self, text: GameText) -> None:
        """Raises TaskError if the engine cannot play the game."""
        check_domain(text.domain)
        self._wording = wording(text.grammar)
        self._engine = Engine(text.problem, self._wording)
        self._text = text
        self._seen = self.opening()
        self.task_type = self._engine.house.goal.task_type

    def opening(self) -> str:
        """Return the welcome, what is seen, and the goal."""
        return self._text.fill(self._engine.opening())

    def actions(self) -> list[str]:
        """Return the admissible commands without `help`, sorted."""
        return [command for command in self._engine.actions() if command != UNLISTED]

    def act(self, action: str) -> Outcome | None:
        """Carry out an admissible command."""
        if not self._engine.is_admissible(action):
            return None
        reply = self._engine.step(action)
        self._seen = reply.text
        return Outcome(reply.text, float(reply.reward), won=reply.done, over=reply.done)

    def anchor(self) -> str:
        """Return the text last read."""
        return self._seen

    def expert(self) -> tuple[str, str]:
        """Return the next step of a plan made with full knowledge. Raises TaskError if there is no way to win."""
        thought, action, names = advise(self._engine.house, self._engine.state)
        return thought, self._wording.command(action, names)


def walkthrough(game: FastGame) -> list[str]:
    """Return the expert's commands from the present state to the goal. Raises TaskError if it does not get there."""
    commands: list[str] = []
    while len(commands) < MOST_EXPERT_STEPS:
        _, command = game.expert()
        outcome = game.act(command)
        if outcome is None:
            raise TaskError(f"the expert's command {command!r} is not admissible after {commands}")
        commands.append(command)
        if outcome.won:
            return commands
    raise TaskError(f"the expert did not win in {MOST_EXPERT_STEPS} steps: {commands}")
