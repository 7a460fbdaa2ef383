"""Game files as ALFWorld's own environment reads them: what is in one, where they lie, and writing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spear_fast.envs.splits import unit_hash
from spear_fast.errors import TaskError

from .generator import Draft, problem_of
from .goals import parse_goal
from .installed import installed
from .problem import Problem, parse_problem

FolderSplit = Literal["train", "seen", "unseen"]
FOLDERS: dict[FolderSplit, tuple[str, ...]] = {
    "train": ("train",),
    "seen": ("seen", "valid_seen"),
    "unseen": ("unseen", "valid_unseen"),
}
"""Where the games of a split lie: as `spear-fast tasks alfworld` writes them, and as in the official data."""
_FILE, _TRAJECTORY = "game.tw-pddl", "traj_data.json"
_UNSUPPORTED = ("movable", "Sliced")
"""ALFWorld's environment leaves out folders with these words in their names."""
_BLANK = "UNKNOWN GOAL"
"""What the package's grammar has in place of the goal's wording."""


@dataclass(frozen=True)
class GameText:
    """A game as text."""

    problem: Problem
    domain: str
    grammar: str
    sentence: str = ""
    """The goal in words, where `grammar` leaves it blank."""

    def fill(self, text: str) -> str:
        """Return a text of the game, or the grammar itself, with the goal's wording in it."""
        return text.replace(_BLANK, self.sentence) if self.sentence else text

    def data(self) -> dict[str, Any]:
        """Return what the real engine loads."""
        return {"pddl_domain": self.domain, "grammar": self.fill(self.grammar), "pddl_problem": self.problem.text()}


def text_of(draft: Draft, name: str = "generated") -> GameText:
    """Return a drawn game as text."""
    data = installed()
    return GameText(problem_of(draft, name), data.domain, data.grammar, draft.sentence)


def read_game(path: Path) -> GameText:
    """Return the game in a file. Raises TaskError if it cannot be read."""
    data = _load(path)
    try:
        return GameText(parse_problem(data["pddl_problem"]), data["pddl_domain"], data["grammar"])
    except KeyError as error:
        raise TaskError(f"{path}: {error} is missing; the file is no game of ALFWorld") from error
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from error


def find_games(folder: Path, split: FolderSplit, task_types: Sequence[str]) -> list[Path]:
    """Return the solvable games of a split in `folder`, in an order that mixes task types, by which paths begin.

    A file's place follows from a hash of its path below the folder, so parts of the list stay disjoint between runs.
    The name of a game's folder, or of the one around it, begins with its task type. Raises TaskError if there is none.
    """
    places = [folder / name for name in FOLDERS[split] if (folder / name).is_dir()]
    files = [path for place in places for path in place.rglob(_FILE) if _is_of(path, place, task_types)]
    files.sort(key=lambda path: unit_hash(path.relative_to(folder).as_posix()))
    solvable = [path for path in files if _load(path).get("solvable")]
    if not solvable:
        names = " or ".join(FOLDERS[split])
        raise TaskError(
            f"task.params.games={str(folder)!r}: no solvable game of {', '.join(task_types)} in {names}; give the "
            f"folder that `spear-fast tasks alfworld --out` wrote or the official one that holds train and valid_unseen"
        )
    return solvable


def write_game(folder: Path, draft: Draft, text: GameText, walkthrough: Sequence[str]) -> None:
    """Write a solved game to `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    game = text.data() | {"solvable": True, "walkthrough": list(walkthrough)}
    (folder / _FILE).write_text(json.dumps(game), encoding="utf-8")
    # ALFWorld's environment takes a folder for a game only if it holds this file.
    parameters = {"object_target": draft.object, "parent_target": draft.target, "toggle_target": draft.lamp}
    parameters |= {"mrecep_target": "", "object_sliced": False}
    trajectory = {
        "task_type": draft.task_type,
        "task_id": folder.name,
        "pddl_params": parameters,
        "scene": {"scene_num": draft.scene.number, "floor_plan": f"FloorPlan{draft.scene.number}"},
        "generator": "spear-fast; not a game of the ALFWorld benchmark",
    }
    (folder / _TRAJECTORY).write_text(json.dumps(trajectory), encoding="utf-8")


def folder_name(draft: Draft, index: int) -> str:
    """Return the name of a written game's folder: task type, object, receptacle or lamp, scene and number."""
    return f"{draft.task_type}-{draft.object}-{draft.target or draft.lamp}-{draft.scene.number}-{index:05d}"


def task_type_of(text: GameText) -> str:
    """Return a game's task type. Raises TaskError if its goal is of none."""
    return parse_goal(text.problem.goal).task_type


def _is_of(path: Path, place: Path, task_types: Sequence[str]) -> bool:
    name = path.relative_to(place).parts[0]
    is_supported = not any(word in name for word in _UNSUPPORTED)
    return is_supported and any(name.startswith(f"{task_type}-") for task_type in task_types)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{path} holds no JSON object; it is no game of ALFWorld")
    return data
