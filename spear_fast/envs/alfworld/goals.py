"""Goals: read off a problem by comparison with the package's own goal of each task type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from spear_fast.errors import TaskError

from .installed import TASK_TYPES, installed
from .problem import normal_pddl

QUALITIES = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
"""What the object must be made."""
_PLACES = {"obj": "object", "recep": "receptacle", "toggle": "lamp"}


@dataclass(frozen=True)
class Goal:
    """What wins a game. Classes are in lower case ("coffeetable")."""

    task_type: str
    object: str
    receptacle: str = ""
    """Where it must lie; empty if it must be looked at under `lamp`."""
    lamp: str = ""
    quality: str = ""
    """"clean", "hot", "cool", or empty."""
    count: int = 1
    """Objects that must lie in one receptacle."""


def goal_text(task_type: str, *, obj: str, receptacle: str, lamp: str) -> str:
    """Return the goal of a problem in PDDL, from the package's template."""
    template = installed().goals[task_type].replace("#", "-")
    # The template also closes the problem, which `Problem.text` does.
    return normal_pddl(template.format(obj=obj, recep=receptacle, toggle=lamp)).removesuffix(" )")


def parse_goal(text: str) -> Goal:
    """Return the goal written as `text` in PDDL. Raises TaskError if it is none of the six task types'."""
    text = normal_pddl(text)
    for task_type in TASK_TYPES:
        found = _pattern(task_type).fullmatch(text)
        if found:
            quality, count = QUALITIES.get(task_type, ""), 2 if task_type == "pick_two_obj_and_place" else 1
            return Goal(task_type, quality=quality, count=count, **found.groupdict())
    raise TaskError(
        f"the game's goal is none of the six task types' of the installed package (engine: textworld plays it): {text}"
    )


@cache
def _pattern(task_type: str) -> re.Pattern[str]:
    marks = {place: f"place{number}place" for number, place in enumerate(_PLACES)}
    text = re.escape(goal_text(task_type, obj=marks["obj"], receptacle=marks["recep"], lamp=marks["toggle"]))
    for place, mark in marks.items():
        name = _PLACES[place]
        text = text.replace(mark, rf"(?P<{name}>\w+)", 1).replace(mark, f"(?P={name})")
    return re.compile(text)
