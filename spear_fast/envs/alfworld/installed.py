"""What the installed package `alfworld` ships as data: rules, grammar, goals, placement rules and scene layouts.

Nothing of the package is imported: that would make a cache folder in the home directory and need textworld.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from spear_fast.errors import MissingDependencyError

TaskType = Literal[
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]
TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)
"""The task types of the benchmark's text games, by their names in the package."""


@dataclass(frozen=True)
class Installed:
    """Data of the package. Classes are in camel case as there ("CoffeeTable")."""

    layouts: Path
    """Folder of the scenes' receptacles and object classes."""
    domain: str
    """The rules, in PDDL."""
    grammar: str
    """Commands and texts; the goal's sentence holds `UNKNOWN GOAL`."""
    goals: Mapping[str, str]
    """Goal of each task type in PDDL, with places for {obj}, {recep} and {toggle}."""
    sentences: Mapping[str, tuple[str, ...]]
    """Wordings of each task type's goal, with the same places."""
    goal_rooms: Mapping[str, frozenset[str]]
    """Kinds of rooms in which a task type makes sense."""
    rooms: Mapping[int, str]
    """Kind of room of each scene."""
    train_scenes: tuple[int, ...]
    test_scenes: tuple[int, ...]
    receptacles: frozenset[str]
    """Classes of receptacles that stay where they are."""
    objects: frozenset[str]
    """Classes of things that can lie in receptacles."""
    holds: Mapping[str, frozenset[str]]
    """Classes of objects that fit into a class of receptacles."""
    openable: frozenset[str]
    containers: frozenset[str]
    """Classes of objects that can hold others."""
    can_be: Mapping[str, frozenset[str]]
    """Classes of objects by "Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"."""


@cache
def installed() -> Installed:
    """Return the data of the installed package. Raises MissingDependencyError if there is none."""
    folder = _folder()
    constants = runpy.run_path(str(folder / "gen" / "constants.py"))
    library = runpy.run_path(str(folder / "gen" / "goal_library.py"))["gdict"]
    static = frozenset(constants["STATIC_RECEPTACLES"])
    return Installed(
        layouts=folder / "gen" / "layouts",
        domain=(folder / "data" / "alfred.pddl").read_text(encoding="utf-8"),
        grammar=(folder / "data" / "alfred.twl2").read_text(encoding="utf-8"),
        goals={task: library[task]["pddl"] for task in TASK_TYPES},
        sentences={task: tuple(library[task]["templates"]) for task in TASK_TYPES},
        goal_rooms={task: frozenset(constants["GOALS_VALID"][task]) for task in TASK_TYPES},
        rooms={scene: room for room, scenes in constants["SCENE_TYPE"].items() for scene in scenes},
        train_scenes=tuple(constants["TRAIN_SCENE_NUMBERS"]),
        test_scenes=tuple(constants["TEST_SCENE_NUMBERS"]),
        receptacles=static & frozenset(constants["RECEPTACLES"]),
        objects=frozenset(constants["OBJECTS_SET"]) - static,
        holds=_sets(constants["VAL_RECEPTACLE_OBJECTS"]),
        openable=frozenset(constants["OPENABLE_CLASS_SET"]),
        containers=frozenset(constants["MOVABLE_RECEPTACLES_SET"]),
        can_be=_sets(constants["VAL_ACTION_OBJECTS"]),
    )


def missing(purpose: str) -> MissingDependencyError:
    """Return the error of a missing package `alfworld`, with the command that installs it."""
    return MissingDependencyError("alfworld", "alfworld", f"{purpose} (pip install --no-deps alfworld is enough)")


def _folder() -> Path:
    try:
        spec = importlib.util.find_spec("alfworld")
    except ValueError:  # sys.modules holds a stand-in without a spec.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise missing("the task set 'alfworld'")
    return Path(spec.submodule_search_locations[0])


def _sets(table: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    return {key: frozenset(values) for key, values in table.items()}
