"""Rooms of Sokoban: walls and targets, what a move does, and how both are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""(rows, columns) of a move."""


@dataclass(frozen=True)
class State:
    """Where player and boxes are. Cells are numbered row by row from the top left: cell = row * width + column."""

    player: int
    boxes: tuple[int, ...]
    """Sorted."""


@dataclass(frozen=True)
class Room:
    """What never changes. The outermost cells are all walls, so a move never leaves the room.

    Example, one row of three cells with a target at its end: `Room(5, 3, frozenset({0, 1, ..., 14}), frozenset({8}))`.
    """

    width: int
    height: int
    walls: frozenset[int]
    targets: frozenset[int]

    @cached_property
    def steps(self) -> dict[str, int]:
        """What each direction adds to the number of a cell."""
        return {name: rows * self.width + columns for name, (rows, columns) in DIRECTIONS.items()}

    @cached_property
    def push_distance(self) -> dict[int, int]:
        """For each cell, the fewest pushes from there to the nearest target if no other box were there.

        A box in a cell that is missing can never reach a target.
        """
        found = dict.fromkeys(sorted(self.targets), 0)
        waiting = list(found)
        for cell in waiting:
            for step in self.steps.values():
                # Pulling backwards: the box comes from `origin`, pushed by a player who stood behind it.
                origin, player = cell - step, cell - 2 * step
                if origin not in found and not {origin, player} & self.walls:
                    found[origin] = found[cell] + 1
                    waiting.append(origin)
        return found

    def after(self, state: State, direction: str) -> State:
        """Return the state after a move; the same one if a wall, or a box that cannot be pushed, is in the way."""
        step = self.steps[direction]
        place = state.player + step
        if place in self.walls:
            return state
        if place not in state.boxes:
            return State(place, state.boxes)
        beyond = place + step
        if beyond in self.walls or beyond in state.boxes:
            return state
        return State(place, tuple(sorted(beyond if box == place else box for box in state.boxes)))

    def num_on_target(self, state: State) -> int:
        """Return how many boxes are on targets."""
        return sum(box in self.targets for box in state.boxes)

    def solved(self, state: State) -> bool:
        """Return whether all boxes are on targets."""
        return self.num_on_target(state) == len(state.boxes)

    def grid(self, state: State) -> str:
        """Return the room as lines of characters, see `symbol`."""
        cells = [self.symbol(state, cell) for cell in range(self.width * self.height)]
        return "\n".join("".join(cells[start : start + self.width]) for start in range(0, len(cells), self.width))

    def symbol(self, state: State, cell: int) -> str:
        """Return # wall, _ floor, O target, X box, * box on a target, P player, S player on a target."""
        if cell in self.walls:
            return "#"
        on_target = cell in self.targets
        if cell == state.player:
            return "S" if on_target else "P"
        if cell in state.boxes:
            return "*" if on_target else "X"
        return "O" if on_target else "_"

    def coordinates(self, state: State) -> str:
        """Return player, boxes, targets and inner walls as `row,column`, the top left cell inside being 1,1."""
        inner = [wall for wall in sorted(self.walls) if self._is_inside(wall)]
        parts = [("P", [state.player]), ("X", state.boxes), ("O", sorted(self.targets)), ("#", inner)]
        return ". ".join(f"{name} {self._places(cells)}" for name, cells in parts if cells)

    def _places(self, cells: Iterable[int]) -> str:
        return " ".join(f"{cell // self.width},{cell % self.width}" for cell in cells)

    def _is_inside(self, cell: int) -> bool:
        row, column = divmod(cell, self.width)
        return 0 < row < self.height - 1 and 0 < column < self.width - 1


def canonical(grid: str) -> str:
    """Return the first, in the order of strings, of a grid's eight turned and mirrored forms."""
    rows = grid.split("\n")
    forms: list[str] = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*reversed(rows), strict=True)]
        forms += ["\n".join(rows), "\n".join(row[::-1] for row in rows)]
    return min(forms)
