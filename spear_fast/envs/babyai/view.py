"""What the agent of a MiniGrid level sees, and can do, in words."""

from __future__ import annotations

from typing import Any

ACTIONS = {
    "turn left": "left",
    "turn right": "right",
    "go forward": "forward",
    "pick up": "pickup",
    "drop": "drop",
    "toggle": "toggle",
}
"""Command: name of the action in minigrid."""
UNSEEN, WALL = 0, 2
THINGS = {4: "door", 5: "key", 6: "ball", 7: "box"}
COLORS = ("red", "green", "blue", "purple", "yellow", "grey")
DOOR_STATES = ("open", "closed", "locked")
"""Names of minigrid's codes."""


def possible_actions(env: Any) -> list[str]:
    """Return the commands that change something now.

    Toggle opens and closes doors, unlocks with the key of the door's colour, and opens boxes, which then are gone.
    """
    cell = env.grid.get(*env.front_pos)
    found = ["turn left", "turn right"]
    if cell is None or cell.can_overlap():
        found.append("go forward")
    if cell is not None and cell.can_pickup() and env.carrying is None:
        found.append("pick up")
    if cell is None and env.carrying is not None:
        found.append("drop")
    if cell is not None and (cell.type == "box" or (cell.type == "door" and _can_turn(cell, env.carrying))):
        found.append("toggle")
    return found


def describe(image: Any, carried: Any) -> str:
    """Return the things in view, nearest first, the walls straight ahead, left and right, and what is carried.

    Args:
        image: minigrid's encoding of the view, [columns, rows, 3] uint8: kind, colour and state of each cell. The
            agent is in the middle of the last row, and looks along the column towards the first.
        carried: The object in hand, or None.
    """
    # Plain lists: single elements of small arrays are slow to read.
    cells = image.tolist()
    place = (len(cells) // 2, len(cells[0]) - 1)
    seen: list[tuple[int, int, int, str]] = []
    for column, line in enumerate(cells):
        for row, (kind, color, state) in enumerate(line):
            if kind in THINGS and (column, row) != place:
                ahead, right = place[1] - row, column - place[0]
                seen.append((ahead + abs(right), ahead, right, _name(kind, color, state)))
    parts = [f"{name} {_offset(ahead, right)}" for _, ahead, right, name in sorted(seen)]
    walls = _walls(cells, place)
    if walls:
        parts.append(f"wall {' '.join(walls)}")
    shown = f"You see {', '.join(parts)}." if parts else "You see nothing."
    return f"{shown} You carry a {carried.color} {carried.type}." if carried is not None else shown


def _can_turn(door: Any, carried: Any) -> bool:
    return not door.is_locked or (carried is not None and carried.type == "key" and carried.color == door.color)


def _name(kind: int, color: int, state: int) -> str:
    name = f"{COLORS[color]} {THINGS[kind]}"
    return f"{DOOR_STATES[state]} {name}" if THINGS[kind] == "door" else name


def _offset(ahead: int, right: int) -> str:
    parts = [f"{ahead} ahead"] if ahead else []
    if right:
        parts.append(f"{abs(right)} {'right' if right > 0 else 'left'}")
    return " ".join(parts)


def _walls(cells: list[list[list[int]]], place: tuple[int, int]) -> list[str]:
    """The distance to the first wall in each direction, where every cell before it is in view."""
    found: list[str] = []
    for word, columns, rows in (("ahead", 0, -1), ("left", -1, 0), ("right", 1, 0)):
        column, row, steps = place[0] + columns, place[1] + rows, 1
        while 0 <= column < len(cells) and row >= 0 and cells[column][row][0] != UNSEEN:
            if cells[column][row][0] == WALL:
                found.append(f"{steps} {word}")
                break
            column, row, steps = column + columns, row + rows, steps + 1
    return found
