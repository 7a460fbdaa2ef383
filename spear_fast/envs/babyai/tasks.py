"""BabyAI as a task set: parameters, one game with its expert, and the three splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from pydantic import Field

from spear_fast.config.schema import NonNegative, Positive
from spear_fast.envs.game import GameParams, GameTasks, Outcome
from spear_fast.envs.pools import Pools
from spear_fast.envs.splits import Split
from spear_fast.seeds import derive_seed

from .expert import Expert
from .library import digest, make_level, restart
from .view import ACTIONS, describe, possible_actions

LADDER = (
    "GoToObjS6",
    "GoToLocal",
    "PickupLoc",
    "PutNextLocalS5N3",
    "PutNextLocal",
    "UnlockLocal",
)
"""Levels in the order in which random play wins less; any other of minigrid's can be used as well.

The bot, by its own account, cannot do KeyInBox and the PutNext levels that begin with something carried.
"""
SYSTEM_PROMPT = "Do what the goal says. Act with <action>command</action>."
CACHE_SIZE = 4096
"""Drawn levels kept in memory, as seeds, so that the trajectories of a group do not each search for theirs again."""


class BabyAIParams(GameParams):
    """Which levels, number of games, and rules."""

    levels: list[str] = Field(default=["GoToRedBallNoDists"], min_length=1)
    """BabyAI levels by minigrid's names without "BabyAI-" and version, drawn in equal shares."""
    max_steps: Positive = 50
    """Messages after which an unfinished game is truncated. Levels of several rooms need more, also of the expert."""
    num_eval: NonNegative = 128
    """Held-out games, all different; no grid with its mission occurs in another split."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""


@dataclass(frozen=True)
class Drawn:
    """A level and the seed that fills it, e.g. `Drawn("GoToObj", 17, layout="3f...", identity="a0...")`."""

    level: str
    seed: int
    layout: str
    """Hash of grid and mission."""
    identity: str
    """Hash of grid, mission and the agent's place."""


class BabyAI:
    """One game. Reward 1 for doing what the mission says; some levels also end in failure, with reward 0.

    The observation tells what is in view, the part of 7 x 7 cells before the agent, in steps ahead and to the sides,
    and what is carried. It is the anchor: different states that look alike are compared, as in the source of GiGPO,
    which takes the raw observation. Commands that would change nothing are not listed and count as invalid.
    """

    def __init__(self, drawn: Drawn) -> None:
        self.env = make_level(drawn.level)
        self._shown = describe(restart(self.env, drawn.seed), self.env.carrying)
        self.task_type = drawn.level
        self._expert = Expert(self.env)

    def opening(self) -> str:
        """Return the mission and what is seen at the start."""
        return f"Goal: {self.env.mission}. {self._shown}"

    def actions(self) -> list[str]:
        """Return the commands that change something."""
        return possible_actions(self.env)

    def act(self, action: str) -> Outcome | None:
        """Carry out a valid command."""
        if action not in self.actions():
            return None
        self._expert.told(action)
        view, reward, over, _, _ = self.env.step(self.env.actions[ACTIONS[action]])
        if not over:
            self._shown = describe(view["image"], self.env.carrying)
            return Outcome(self._shown)
        won = reward > 0
        return Outcome("Done." if won else "You failed.", reward=float(won), won=won, over=True)

    def anchor(self) -> str:
        """Return what is seen and carried."""
        return self._shown

    def expert(self) -> tuple[str, str]:
        """Return the command of minigrid's bot. Raises TaskError where the mission cannot be done any more."""
        return "", self._expert.advise()


class BabyAITasks(GameTasks):
    """BabyAI games in three splits without a common grid and mission: train, eval and demo."""

    Params = BabyAIParams
    params: BabyAIParams

    def __init__(self, params: BabyAIParams, seed: int) -> None:
        """`seed` decides which games are drawn.

        Raises MissingDependencyError without minigrid, ConfigError for an unknown level or if a level of too few
        different games leaves a split empty.
        """
        super().__init__("babyai", params)
        self._seed = seed
        # Only for drawing: games are played in environments of their own.
        self._drawing = {level: make_level(level) for level in params.levels}
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_layout, identity=_identity)
        self._drawn = lru_cache(maxsize=CACHE_SIZE)(self._pools.get)

    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def start(self, split: Split, index: int) -> BabyAI:
        """Return a game at its beginning. Raises TaskError if there is none."""
        return BabyAI(self.drawn(split, index))

    def drawn(self, split: Split, index: int) -> Drawn:
        """Return what a game is made from, the same for the same (params, seed, split, index)."""
        return self._drawn(split, index)

    def _generate(self, split: Split, draw: int) -> Drawn:
        random = Random(derive_seed(self._seed, self.name, split, draw))
        level, seed = random.choice(self.params.levels), random.getrandbits(31)
        env = self._drawing[level]
        restart(env, seed)
        return Drawn(level, seed, digest(env, with_agent=False), digest(env, with_agent=True))


def _layout(drawn: Drawn) -> str:
    return drawn.layout


def _identity(drawn: Drawn) -> str:
    return drawn.identity
