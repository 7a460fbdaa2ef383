"""Sokoban as a task set: parameters, one game with its expert, and the three splits."""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import Annotated, Literal

from pydantic import Field, model_validator

from spear_fast.config.schema import NonNegative, NonNegativeFloat, Positive
from spear_fast.envs.game import GameParams, GameTasks, Outcome
from spear_fast.envs.pools import Pools
from spear_fast.envs.splits import Split, split_of
from spear_fast.errors import TaskError
from spear_fast.seeds import derive_seed

from .generator import Puzzle, generate
from .room import DIRECTIONS, State
from .solver import solve

SYSTEM_PROMPT = (
    "Sokoban. Push all boxes X onto targets O. P you, # wall, _ floor, * box on target, S you on target. "
    "Act with <action>up|down|left|right</action>."
)
CACHE_SIZE = 1024
"""Puzzles kept in memory, so that the trajectories of a group do not each solve their puzzle again."""


class SokobanParams(GameParams):
    """Size of the rooms, number of games, and rules. Harder: more boxes, more pushes, larger rooms, more walls."""

    width: Annotated[int, Field(ge=5, le=10)] = 6
    """Columns, the two of the outer wall included."""
    height: Annotated[int, Field(ge=5, le=10)] = 6
    """Rows, the two of the outer wall included."""
    num_boxes: Annotated[int, Field(ge=1, le=4)] = 1
    """Boxes, and targets."""
    wall_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of the cells inside that are walls, rounded to whole cells."""
    min_pushes: Positive = 1
    """Fewest pushes in the shortest solution of a puzzle (shortest in moves)."""
    max_pushes: Positive = 4
    """Most pushes in the shortest solution of a puzzle."""
    max_steps: Positive = 20
    """Messages after which an unfinished game is truncated. Puzzles that need more moves are not used."""
    view: Literal["grid", "coordinates"] = "grid"
    """What the policy reads: lines of characters, or `row,column` of player P, boxes X, targets O and inner walls #."""
    box_reward: NonNegativeFloat = 0.0
    """Given for each box that comes onto a target, taken back for each that leaves one."""
    step_penalty: NonNegativeFloat = 0.0
    """Subtracted from the reward of each valid action."""
    num_eval: NonNegative = 128
    """Held-out games, all different; no room with its boxes occurs in another split, however turned or mirrored."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""
    show_actions: bool = False
    """List the valid commands in each observation. They are always the same four."""

    @property
    def num_walls(self) -> int:
        """Walls besides the outer ones."""
        return round(self.wall_share * (self.width - 2) * (self.height - 2))

    @model_validator(mode="after")
    def _puzzles_exist(self) -> SokobanParams:
        if self.max_pushes < self.min_pushes:
            raise ValueError(
                f"task.params.max_pushes={self.max_pushes} is below min_pushes={self.min_pushes}; raise it"
            )
        if self.max_steps < self.min_pushes:
            raise ValueError(f"task.params.max_steps={self.max_steps} is below min_pushes={self.min_pushes}; raise it")
        free = (self.width - 2) * (self.height - 2) - self.num_walls
        if free < 2 * self.num_boxes + 1:
            raise ValueError(
                f"task.params.num_boxes={self.num_boxes} is too many for {free} cells without wall; "
                f"use at most {(free - 1) // 2}, or larger rooms, or a lower wall_share"
            )
        return self


class Sokoban:
    """One game. Reward 1 when the last box comes onto a target.

    The valid commands are always up, down, left and right; a move against a wall or against a box that cannot be
    pushed is valid and changes nothing, as in gym-sokoban. A game that can no longer be won goes on until the step
    limit. The observation is the whole state and the anchor.
    """

    def __init__(self, puzzle: Puzzle, params: SokobanParams) -> None:
        self._puzzle = puzzle
        self._params = params
        self._plan: dict[State, str] = {}
        self.state = puzzle.start
        self.task_type = f"{params.num_boxes} box" if params.num_boxes == 1 else f"{params.num_boxes} boxes"

    def opening(self) -> str:
        """Return the room."""
        return self.anchor()

    def actions(self) -> list[str]:
        """Return the four directions."""
        return list(DIRECTIONS)

    def act(self, action: str) -> Outcome | None:
        """Move in a direction, pushing the box that is there."""
        if action not in DIRECTIONS:
            return None
        room, before = self._puzzle.room, self.state
        self.state = room.after(before, action)
        reward = self._params.box_reward * (room.num_on_target(self.state) - room.num_on_target(before))
        reward -= self._params.step_penalty
        if room.solved(self.state):
            return Outcome("All boxes are on targets.", reward=reward + 1.0, won=True, over=True)
        return Outcome(self.anchor(), reward=reward)

    def anchor(self) -> str:
        """Return the room as the policy sees it."""
        room = self._puzzle.room
        return room.grid(self.state) if self._params.view == "grid" else room.coordinates(self.state)

    def expert(self) -> tuple[str, str]:
        """Return which way the next push goes, and the first move of a shortest solution from the present state.

        Raises TaskError if the state cannot be solved any more, or not within the solver's limit.
        """
        if self.state not in self._plan:
            self._remember(self._solution())
        room, state = self._puzzle.room, self.state
        while room.after(state, self._plan[state]).boxes == state.boxes:
            state = room.after(state, self._plan[state])
        return f"Push {self._plan[state]}.", self._plan[self.state]

    def _solution(self) -> tuple[str, ...]:
        if self.state == self._puzzle.start:
            return self._puzzle.solution
        try:
            moves = solve(self._puzzle.room, self.state)
        except OverflowError as error:
            raise TaskError(f"the Sokoban expert gave up: {error}; ask it in smaller rooms") from error
        if moves is None:
            raise TaskError("this Sokoban state cannot be solved any more: a box is stuck; ask the expert earlier")
        return moves

    def _remember(self, moves: tuple[str, ...]) -> None:
        state = self.state
        for move in moves:
            self._plan[state] = move
            state = self._puzzle.room.after(state, move)


class SokobanTasks(GameTasks):
    """Sokoban puzzles in three splits without a common room with its boxes: train, eval and demo."""

    Params = SokobanParams
    params: SokobanParams

    def __init__(self, params: SokobanParams, seed: int) -> None:
        """`seed` decides which puzzles are drawn. Raises ConfigError if `params` leave too few of them."""
        super().__init__("sokoban", params)
        self._seed = seed
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_layout, identity=_identity)
        self._puzzle = lru_cache(maxsize=CACHE_SIZE)(self._pools.get)

    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def start(self, split: Split, index: int) -> Sokoban:
        """Return a game at its beginning. Raises TaskError if there is none."""
        return Sokoban(self.puzzle(split, index), self.params)

    def puzzle(self, split: Split, index: int) -> Puzzle:
        """Return a puzzle, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._puzzle(split, index)

    def _generate(self, split: Split, draw: int) -> Puzzle | None:
        params = self.params
        random = Random(derive_seed(self._seed, self.name, split, draw))
        num_pulls = random.randint(params.min_pushes, 2 * params.max_pushes)
        puzzle = generate(random, params.width, params.height, params.num_boxes, params.num_walls, num_pulls)
        # The split is looked up before the search, which is what costs time.
        if puzzle is None or split_of(puzzle.layout) != split:
            return None
        return puzzle if self._fits(puzzle) else None

    def _fits(self, puzzle: Puzzle) -> bool:
        params = self.params
        try:
            short = len(puzzle.solution) <= params.max_steps
        except OverflowError:
            return False
        return short and params.min_pushes <= puzzle.num_pushes <= params.max_pushes


def _layout(puzzle: Puzzle) -> str:
    return puzzle.layout


def _identity(puzzle: Puzzle) -> str:
    return puzzle.identity
