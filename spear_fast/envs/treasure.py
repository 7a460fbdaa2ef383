"""A seeded text game: find the key, find the chest, open it. States repeat, as step-level advantages need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Annotated, Any

from pydantic import Field

from spear_fast.config.schema import NonNegative, NonNegativeFloat, Positive, Section
from spear_fast.errors import TaskError
from spear_fast.seeds import derive_seed

from .base import Info, StepResult, Tool
from .pools import Pools
from .splits import Split
from .text import tagged, tagged_message
from .treasure_map import ROOM_NAMES, State, TreasureMap, generate_map

SYSTEM_PROMPT = "Find the treasure. Act with <action>command</action>."


class TreasureParams(Section):
    """Size of the maps, number of games, and rules."""

    num_rooms: Annotated[int, Field(ge=3, le=len(ROOM_NAMES))] = 4
    """Rooms of a map; more rooms are harder."""
    with_key: bool = True
    """Lock the chest; the key lies in another room."""
    max_steps: Positive = 20
    """Messages after which an unfinished game is truncated. Maps that need more are not used."""
    invalid_penalty: NonNegativeFloat = 0.1
    """Subtracted from the reward for each message without a valid action."""
    num_train: Positive = 4096
    """Training games."""
    num_eval: NonNegative = 128
    """Held-out games, all different; no map of them occurs in the other splits, under whatever room names."""
    num_demo: NonNegative = 2048
    """Games for demonstrations, held out from training as well."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""


class TreasureEnv:
    """One game, one command per message in `<action>` tags. Reward 1 for opening the chest.

    The observation shows the room, what lies in it, whether the key is held, and the valid commands: the whole state
    but for the map. It is the anchor, so equal states of one group have equal anchors.
    """

    def __init__(self, tasks: TreasureTasks) -> None:
        self._tasks = tasks
        self._map: TreasureMap | None = None
        self._state = State(room=0, has_key=False)
        self._num_steps = 0
        self.tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start game `options["index"]` of `options["split"]`, which alone decide it.

        Raises TaskError if there is no such game.
        """
        self._map = self._tasks.game(options["split"], options["index"])
        self._state = self._map.start
        self._num_steps = 0
        shown = _observation(self._map, self._state)
        return shown, Info(admissible=self._map.actions(self._state), anchor=shown, task_type="treasure")

    async def step(self, text: str) -> StepResult:
        """Carry out the command in `text`; a message without a valid one changes nothing and costs the penalty."""
        game = self._started()
        self._num_steps += 1
        action = " ".join((tagged(text, "action") or "").lower().split())
        valid = action in game.actions(self._state)
        following = game.after(self._state, action) if valid else self._state
        # Any valid command counts as an answer: a game lost by its step limit is complete.
        if following is None:
            won = Info(won=True, action_valid=True, answered=True, admissible=[], anchor="won")
            return "You found the treasure.", 1.0, True, False, won
        self._state = following
        shown = _observation(game, following)
        info = Info(won=False, action_valid=valid, answered=valid, admissible=game.actions(following), anchor=shown)
        reward = 0.0 if valid else -self._tasks.params.invalid_penalty
        truncated = self._num_steps >= self._tasks.params.max_steps
        return shown if valid else f"Invalid action. {shown}", reward, False, truncated, info

    async def close(self) -> None:
        """Nothing is held."""

    def expert(self) -> str:
        """Return the first action of a shortest solution from the present state."""
        action = self._started().shortest_solution(self._state)[0]
        goal = "chest" if self._state.has_key or not self._tasks.params.with_key else "key"
        return tagged_message(f"I need the {goal}.", "action", action)

    def _started(self) -> TreasureMap:
        if self._map is None:
            raise TaskError("the game was used before reset; reset the environment first")
        return self._map


class TreasureTasks:
    """Treasure games in three splits without a common map: train, eval and demo."""

    Params = TreasureParams

    def __init__(self, params: TreasureParams, seed: int) -> None:
        """`seed` decides which games are drawn. Raises ConfigError if `params` leave too few of them."""
        self.name = "treasure"
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = ()
        self._seed = seed
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_layout, identity=_layout_and_names)

    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def make(self) -> TreasureEnv:
        """Return a fresh environment."""
        return TreasureEnv(self)

    def game(self, split: Split, index: int) -> TreasureMap:
        """Return a game, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._pools.get(split, index)

    def _generate(self, split: Split, draw: int) -> TreasureMap | None:
        random = Random(derive_seed(self._seed, self.name, split, draw))
        game = generate_map(random, self.params.num_rooms, self.params.with_key)
        return game if len(game.shortest_solution(game.start)) <= self.params.max_steps else None


def _layout(game: TreasureMap) -> str:
    return game.layout


def _layout_and_names(game: TreasureMap) -> str:
    return f"{game.layout} {' '.join(game.names)}"


def _observation(game: TreasureMap, state: State) -> str:
    parts = [f"You are in the {game.names[state.room]}."]
    if state.room == game.key and not state.has_key:
        parts.append("You see a key.")
    if state.room == game.chest:
        parts.append("You see a chest." if game.key is None or state.has_key else "You see a locked chest.")
    if state.has_key:
        parts.append("You hold the key.")
    parts.append(f"Actions: {', '.join(game.actions(state))}")
    return " ".join(parts)
