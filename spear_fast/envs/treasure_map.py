"""Maps of the treasure game: seeded generation, rules of movement, and the shortest way to win."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

ROOM_NAMES = (
    "attic", "barn", "cave", "cellar", "chapel", "den", "hall", "kitchen",
    "library", "pantry", "porch", "shed", "stable", "study", "tower", "vault",
)  # fmt: skip
DIRECTIONS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
EXTRA_DOOR_SHARE = 0.3
"""Chance of a door between neighbouring rooms that are connected already, which makes circular ways."""

Cell = tuple[int, int]


@dataclass(frozen=True)
class State:
    """Where the player is and whether the key is held, e.g. `State(room=2, has_key=False)`."""

    room: int
    has_key: bool


@dataclass(frozen=True)
class TreasureMap:
    """Rooms 0..n-1 with doors; the player starts in room 0.

    Example of two rooms: `TreasureMap(("hall", "den"), ({"east": 1}, {"west": 0}), chest=1, key=None, layout="...")`.
    """

    names: tuple[str, ...]
    exits: tuple[dict[str, int], ...]
    """For each room, the room behind each direction."""
    chest: int
    key: int | None
    """Room of the key; None if the chest is not locked."""
    layout: str
    """Doors, start, key and chest without the names, by `layout_text`: equal layouts are the same puzzle."""

    @property
    def start(self) -> State:
        """The state before the first action."""
        return State(room=0, has_key=False)

    def actions(self, state: State) -> list[str]:
        """Return the commands that are valid in `state`."""
        found = [f"go {direction}" for direction in self.exits[state.room]]
        if state.room == self.key and not state.has_key:
            found.append("take key")
        if state.room == self.chest and (state.has_key or self.key is None):
            found.append("open chest")
        return found

    def after(self, state: State, action: str) -> State | None:
        """Return the state after a valid `action`, or None if it opened the chest."""
        if action == "open chest":
            return None
        if action == "take key":
            return State(state.room, has_key=True)
        return State(self.exits[state.room][action.removeprefix("go ")], state.has_key)

    def shortest_solution(self, state: State) -> list[str]:
        """Return a shortest list of actions from `state` that opens the chest. Breadth-first search."""
        waiting = deque([(state, [])])
        seen = {state}
        while waiting:
            current, path = waiting.popleft()
            for action in self.actions(current):
                following = self.after(current, action)
                if following is None:
                    return [*path, action]
                if following not in seen:
                    seen.add(following)
                    waiting.append((following, [*path, action]))
        raise ValueError(f"map {self.layout!r} cannot be solved")


def generate_map(random: Random, num_rooms: int, with_key: bool) -> TreasureMap:
    """Return a connected map drawn from `random`; start, key and chest stand in different rooms.

    `num_rooms` lies between 3 and len(ROOM_NAMES).
    """
    cells, doors = _grow(random, num_rooms)
    order = random.sample(range(num_rooms), num_rooms)
    # Rooms are numbered in the order of `order`, so that start, key and chest are rooms 0, 1 and 2 anywhere on the map.
    rooms = {cells[place]: number for number, place in enumerate(order)}
    exits = tuple(_exits(cells[place], rooms, doors) for place in order)
    names = tuple(random.sample(ROOM_NAMES, num_rooms))
    return TreasureMap(names, exits, chest=2, key=1 if with_key else None, layout=layout_text(exits, with_key))


def _grow(random: Random, num_rooms: int) -> tuple[list[Cell], set[frozenset[Cell]]]:
    """Cells of the rooms, grown from one cell, and the pairs of cells with a door between them."""
    cells: list[Cell] = [(0, 0)]
    doors: set[frozenset[Cell]] = set()
    while len(cells) < num_rooms:
        origin = random.choice(cells)
        cell = random.choice(list(_neighbours(origin)))
        if cell not in cells:
            cells.append(cell)
            doors.add(frozenset((origin, cell)))
    for first in cells:
        for second in _neighbours(first):
            if first < second and second in cells and random.random() < EXTRA_DOOR_SHARE:
                doors.add(frozenset((first, second)))
    return cells, doors


def _neighbours(cell: Cell) -> Iterator[Cell]:
    return ((cell[0] + right, cell[1] + up) for right, up in DIRECTIONS.values())


def _exits(cell: Cell, rooms: dict[Cell, int], doors: set[frozenset[Cell]]) -> dict[str, int]:
    beside = zip(DIRECTIONS, _neighbours(cell), strict=True)
    return {direction: rooms[other] for direction, other in beside if frozenset((cell, other)) in doors}


def layout_text(exits: tuple[dict[str, int], ...], with_key: bool) -> str:
    """Return the doors, the chest (room 2) and the key (room 1) as text, the same for every numbering of the rest.

    Rooms are renumbered in the order in which a search from the start (room 0) meets them; all must be connected.
    """
    met = [0]
    for room in met:
        met.extend(exits[room][way] for way in DIRECTIONS if way in exits[room] and exits[room][way] not in met)
    doors = [",".join(f"{way[0]}{met.index(other)}" for way, other in sorted(exits[room].items())) for room in met]
    return f"{' '.join(doors)} chest {met.index(2)}" + (f" key {met.index(1)}" if with_key else "")
