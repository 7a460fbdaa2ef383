"""A seeded text game: find the key, find the chest, open it. States repeat, as step-level advantages need."""

from __future__ import annotations

from random import Random
from typing import Annotated

from pydantic import Field

from spear_fast.config.schema import NonNegative, Positive
from spear_fast.seeds import derive_seed

from .game import GameParams, GameTasks, Outcome
from .pools import Pools
from .splits import Split
from .treasure_map import ROOM_NAMES, State, TreasureMap, generate_map

SYSTEM_PROMPT = "Find the treasure. Act with <action>command</action>."


class TreasureParams(GameParams):
    """Size of the maps, number of games, and rules."""

    num_rooms: Annotated[int, Field(ge=3, le=len(ROOM_NAMES))] = 4
    """Rooms of a map; more rooms are harder."""
    with_key: bool = True
    """Lock the chest; the key lies in another room."""
    max_steps: Positive = 20
    """Messages after which an unfinished game is truncated. Maps that need more are not used."""
    num_eval: NonNegative = 128
    """Held-out games, all different; no map of them occurs in the other splits, under whatever room names."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""


class Treasure:
    """One game. Reward 1 for opening the chest.

    The observation shows the room, what lies in it, whether the key is held, and the valid commands: the whole state
    but for the map. It is the anchor, so equal states of one group have equal anchors.
    """

    task_type = "treasure"

    def __init__(self, layout: TreasureMap, with_key: bool) -> None:
        self._map = layout
        self._with_key = with_key
        self.state = layout.start

    def opening(self) -> str:
        """Return what is seen at the start."""
        return _observation(self._map, self.state)

    def actions(self) -> list[str]:
        """Return the valid commands."""
        return self._map.actions(self.state)

    def act(self, action: str) -> Outcome | None:
        """Carry out a valid command."""
        if action not in self.actions():
            return None
        following = self._map.after(self.state, action)
        if following is None:
            return Outcome("You found the treasure.", reward=1.0, won=True, over=True)
        self.state = following
        return Outcome(_observation(self._map, following))

    def anchor(self) -> str:
        """Return what is seen, and the valid commands."""
        return f"{_observation(self._map, self.state)} Actions: {', '.join(self.actions())}"

    def expert(self) -> tuple[str, str]:
        """Return the first action of a shortest solution from the present state."""
        goal = "chest" if self.state.has_key or not self._with_key else "key"
        return f"I need the {goal}.", self._map.shortest_solution(self.state)[0]


class TreasureTasks(GameTasks):
    """Treasure games in three splits without a common map: train, eval and demo."""

    Params = TreasureParams
    params: TreasureParams

    def __init__(self, params: TreasureParams, seed: int) -> None:
        """`seed` decides which games are drawn. Raises ConfigError if `params` leave too few of them."""
        super().__init__("treasure", params)
        self._seed = seed
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_layout, identity=_layout_and_names)

    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def start(self, split: Split, index: int) -> Treasure:
        """Return a game at its beginning. Raises TaskError if there is none."""
        return Treasure(self.game(split, index), self.params.with_key)

    def game(self, split: Split, index: int) -> TreasureMap:
        """Return a map, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
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
    return " ".join(parts)
