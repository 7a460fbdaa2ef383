"""Seeded Sokoban puzzles: random walls and targets, boxes pulled away from the targets, then solved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random

from .room import Room, State, canonical
from .solver import count_pushes, solve, walks


@dataclass(frozen=True)
class Puzzle:
    """A room and where player and boxes are at first."""

    room: Room
    start: State

    @cached_property
    def layout(self) -> str:
        """Walls, targets and boxes without the player, the same however the room is turned or mirrored."""
        return canonical(self.room.grid(State(-1, self.start.boxes)))

    @cached_property
    def identity(self) -> str:
        """The whole puzzle, the same however it is turned or mirrored."""
        return canonical(self.room.grid(self.start))

    @cached_property
    def solution(self) -> tuple[str, ...]:
        """A shortest list of moves. Raises OverflowError if the search takes too long."""
        moves = solve(self.room, self.start)
        assert moves is not None, "puzzles are made backwards from a solved state"
        return moves

    @property
    def num_pushes(self) -> int:
        """Pushes in `solution`."""
        return count_pushes(self.room, self.start, self.solution)


def generate(random: Random, width: int, height: int, num_boxes: int, num_walls: int, num_pulls: int) -> Puzzle | None:
    """Return a puzzle drawn from `random`; None if the draw leads to none.

    Args:
        random: Decides everything.
        width: Columns, the two of the outer wall included.
        height: Rows, the two of the outer wall included.
        num_boxes: Boxes, and targets.
        num_walls: Walls besides the outer ones. They never divide the floor.
        num_pulls: Backward pushes from the solved state, an upper limit for the pushes a solution needs.
    """
    inner = [row * width + column for row in range(1, height - 1) for column in range(1, width - 1)]
    outer = set(range(width * height)).difference(inner)
    placed = random.sample(inner, num_walls + num_boxes + 1)
    walls, things = placed[:num_walls], placed[num_walls:]
    room = Room(width, height, frozenset(outer.union(walls)), frozenset(things[1:]))
    if len(walks(room, State(things[0], ()))) < len(inner) - num_walls:
        return None
    state: State | None = State(things[0], tuple(sorted(things[1:])))
    for _ in range(num_pulls):
        state = _pull(random, room, state)
        if state is None:
            return None
    # Wherever the player can walk to is a start of the same difficulty in pushes.
    start = State(random.choice(sorted(walks(room, state))), state.boxes)
    return None if room.num_on_target(start) == num_boxes else Puzzle(room, start)


def _pull(random: Random, room: Room, state: State) -> State | None:
    """The state before a random push that leads to `state`; None if nothing can be pulled."""
    reachable = walks(room, state)
    found: list[State] = []
    for box in state.boxes:
        for step in room.steps.values():
            # The player stands beside the box and steps back; the box follows.
            place, back = box + step, box + 2 * step
            if place in reachable and back not in room.walls and back not in state.boxes:
                found.append(State(back, tuple(sorted(place if each == box else each for each in state.boxes))))
    return random.choice(found) if found else None
