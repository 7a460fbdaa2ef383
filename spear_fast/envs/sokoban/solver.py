"""Exact solver of Sokoban: A* over pushes, shortest in moves, boxes kept out of cells without a way to a target."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from .room import Room, State

MAX_NODES = 20_000
"""Positions after which a search gives up, far more than rooms of 8 x 8 with three boxes need."""

Parents = dict[State, tuple[State, tuple[str, ...]]]


def solve(room: Room, start: State, max_nodes: int = MAX_NODES) -> tuple[str, ...] | None:
    """Return a shortest list of moves that brings all boxes onto targets; None if there is none.

    Nodes are the states right after a push, edges cost the walk to the box and the push. The sum of the boxes' push
    distances is a lower bound of the moves left (each push is a move of one box) and never falls by more than an
    edge costs, so the first solved state taken is the nearest.

    Raises:
        OverflowError: `max_nodes` states were looked at without an answer.
    """
    distance = room.push_distance
    if any(box not in distance for box in start.boxes):
        return None
    parents: Parents = {}
    cost = {start: 0}
    # The counter makes ties go to the state met first, whatever State's order.
    heap: list[tuple[int, int, int, State]] = [(sum(distance[box] for box in start.boxes), 0, 0, start)]
    done: set[State] = set()
    met = 0
    while heap:
        _, _, moves, state = heappop(heap)
        if state in done:
            continue
        if room.solved(state):
            return _path(parents, start, state)
        done.add(state)
        if len(done) > max_nodes:
            raise OverflowError(f"no solution among the first {max_nodes} positions")
        for following, path in _pushes(room, state):
            total = moves + len(path)
            if total < cost.get(following, total + 1):
                cost[following], parents[following] = total, (state, path)
                met += 1
                bound = total + sum(distance[box] for box in following.boxes)
                heappush(heap, (bound, met, total, following))
    return None


def count_pushes(room: Room, start: State, moves: tuple[str, ...]) -> int:
    """Return how many of `moves` push a box."""
    pushes, state = 0, start
    for move in moves:
        following = room.after(state, move)
        pushes += following.boxes != state.boxes
        state = following
    return pushes


def _pushes(room: Room, state: State) -> Iterator[tuple[State, tuple[str, ...]]]:
    """Every state one push away, with the moves that lead there; none that has a box where it is stuck for good."""
    ways = walks(room, state)
    for box in state.boxes:
        for direction, step in room.steps.items():
            way, place = ways.get(box - step), box + step
            if way is not None and place in room.push_distance and place not in state.boxes:
                boxes = tuple(sorted(place if each == box else each for each in state.boxes))
                yield State(box, boxes), (*way, direction)


def walks(room: Room, state: State) -> dict[int, tuple[str, ...]]:
    """Return, for each cell that the player can walk to without a push, a shortest list of moves."""
    ways: dict[int, tuple[str, ...]] = {state.player: ()}
    waiting = [state.player]
    for cell in waiting:
        for direction, step in room.steps.items():
            place = cell + step
            if place not in ways and place not in room.walls and place not in state.boxes:
                ways[place] = (*ways[cell], direction)
                waiting.append(place)
    return ways


def _path(parents: Parents, start: State, state: State) -> tuple[str, ...]:
    moves: tuple[str, ...] = ()
    while state != start:
        state, path = parents[state]
        moves = path + moves
    return moves
