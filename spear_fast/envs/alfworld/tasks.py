"""The task set: which games there are in each split, on which engine, and writing them to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from spear_fast.config.schema import NonNegative, Positive
from spear_fast.envs.game import Game, GameEnv, GameParams, GameTasks
from spear_fast.envs.pools import Pools
from spear_fast.envs.splits import Split, check_index, check_split
from spear_fast.errors import ConfigError
from spear_fast.seeds import derive_seed

from .fast_game import FastGame, walkthrough
from .game_files import FolderSplit, GameText, find_games, folder_name, read_game, text_of, write_game
from .generator import Draft, Sizes, draw
from .installed import TASK_TYPES, TaskType, installed

DEMO_SHARE = 5
"""One in so many training files is kept for demonstrations."""
MOST_INDICES = 20
"""Draws for each written training game after which there are too few different ones."""


class AlfworldParams(GameParams):
    """Which games, and how hard they are."""

    task_types: list[TaskType] = Field(default_factory=lambda: list(TASK_TYPES))
    """Task types that occur, equally often."""
    eval_split: Literal["seen", "unseen"] = "unseen"
    """Scenes of the evaluation: those of training (with other games) or the package's test scenes."""
    games: str = ""
    """Folder of game files, official or written by `spear-fast tasks alfworld`; empty to generate games."""
    engine: Literal["fast", "textworld"] = "fast"
    """The engine of this package, or ALFWorld's own, which needs the package's dependencies."""
    max_receptacles: Annotated[int, Field(ge=4)] | None = None
    """Receptacles kept of a generated game's scene; fewer are easier."""
    min_extra_objects: NonNegative = 6
    """Fewest objects of a generated game beside those of its goal."""
    max_extra_objects: NonNegative = 14
    """Most objects of a generated game beside those of its goal."""
    max_plan_length: Positive | None = None
    """Most commands that the expert needs in a generated game; fewer are easier."""

    @field_validator("task_types")
    @classmethod
    def _some_task_types(cls, task_types: list[TaskType]) -> list[TaskType]:
        if not task_types or len(set(task_types)) < len(task_types):
            raise ValueError(f"task.params.task_types={task_types}: name at least one task type, each of them once")
        return task_types

    @model_validator(mode="after")
    def _objects_in_order(self) -> AlfworldParams:
        if self.min_extra_objects > self.max_extra_objects:
            raise ValueError(
                f"task.params.min_extra_objects={self.min_extra_objects} is above "
                f"max_extra_objects={self.max_extra_objects}; lower it"
            )
        return self


class AlfworldTasks(GameTasks):
    """ALFWorld games in disjoint splits: train, eval ("seen" or "unseen" scenes) and demo."""

    Params = AlfworldParams
    params: AlfworldParams

    def __init__(self, params: AlfworldParams, seed: int) -> None:
        """`seed` decides which games are generated.

        Raises ConfigError if `params` leave too few games, TaskError for a folder without games, and
        MissingDependencyError without the package alfworld (or, for the real engine, textworld).
        """
        super().__init__("alfworld", params)
        self._game, self._env = _engine(params)
        self._source = _FileSource(self.name, params) if params.games else _DrawnSource(self.name, params, seed)

    def size(self, split: str) -> int:
        """Return the number of games in `split`. Raises TaskError for an unknown split."""
        return self._source.size(split)

    def start(self, split: Split, index: int) -> Game:
        """Return a game at its beginning. Raises TaskError if there is none."""
        return self._game(self._source.text(split, index))

    def make(self) -> GameEnv:
        """Return a fresh environment."""
        return self._env(self)

    @classmethod
    def write_games(cls, params: AlfworldParams, *, count: int, seed: int, out: Path) -> list[str]:
        """Write `count` generated games each of train, seen and unseen scenes below `out`; return lines to print.

        All differ, and the expert has solved each. Raises ConfigError if `params` leave too few or `out` holds files.
        """
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out} is not empty; name a new folder")
        lines = []
        for split, drafts in _drafts_to_write(params, count, seed):
            steps = 0
            for index, draft in enumerate(drafts):
                text = text_of(draft, f"{split}-{index}")
                commands = walkthrough(FastGame(text))
                write_game(out / split / folder_name(draft, index), draft, text, commands)
                steps += len(commands)
            lines.append(
                f"{split}: {len(drafts)} games, all solved by the expert, {steps / len(drafts):.1f} steps on average"
            )
        lines.append(f"Use them with task.params.games={out}. They are not the games of the ALFWorld benchmark.")
        return lines


class _DrawnSource:
    """Games drawn by a seed."""

    def __init__(self, name: str, params: AlfworldParams, seed: int) -> None:
        self._name, self._params, self._seed = name, params, seed
        data = installed()
        eval_scenes = data.test_scenes if params.eval_split == "unseen" else data.train_scenes
        self._scenes = {"train": data.train_scenes, "eval": eval_scenes, "demo": data.train_scenes}
        self._sizes = Sizes((params.min_extra_objects, params.max_extra_objects), params.max_receptacles)
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(name, sizes, self._draw, key=_identity, identity=_identity)

    def size(self, split: str) -> int:
        return self._pools.size(split)

    def draft(self, split: Split, index: int) -> Draft:
        return self._pools.get(split, index)

    def text(self, split: Split, index: int) -> GameText:
        return text_of(self.draft(split, index))

    def _draw(self, split: Split, number: int) -> Draft | None:
        random = Random(derive_seed(self._seed, self._name, split, number))
        draft = draw(random, self._params.task_types, self._scenes[split], self._sizes)
        most = self._params.max_plan_length
        if draft is None or most is None or len(walkthrough(FastGame(text_of(draft)))) <= most:
            return draft
        return None


class _FileSource:
    """Games in files; part of the training games is held out for demonstrations."""

    def __init__(self, name: str, params: AlfworldParams) -> None:
        self._name = name
        folder = Path(params.games)
        train = find_games(folder, "train", params.task_types)
        held_out = max(1, len(train) // DEMO_SHARE) if params.num_demo and len(train) > 1 else 0
        found: FolderSplit = params.eval_split
        self._files: dict[str, list[Path]] = {
            "train": train[held_out:][: params.num_train],
            "eval": find_games(folder, found, params.task_types)[: params.num_eval] if params.num_eval else [],
            "demo": train[:held_out][: params.num_demo],
        }
        self._sizes = {split: len(files) for split, files in self._files.items()}

    def size(self, split: str) -> int:
        check_split(self._name, split, self._sizes)
        return self._sizes[split]

    def text(self, split: Split, index: int) -> GameText:
        check_index(self._name, split, index, self._sizes)
        return read_game(self._files[split][index])


def _engine(params: AlfworldParams) -> tuple[Callable[..., Game], type[GameEnv]]:
    if params.engine == "fast":
        return FastGame, GameEnv
    from .textworld_game import TextworldEnv, TextworldGame

    return TextworldGame, TextworldEnv


def _drafts_to_write(params: AlfworldParams, count: int, seed: int) -> Iterator[tuple[str, list[Draft]]]:
    sizes = {"num_train": count * MOST_INDICES, "num_eval": count, "num_demo": 0, "games": ""}
    for eval_split in ("seen", "unseen"):
        source = _DrawnSource("alfworld", params.model_copy(update=sizes | {"eval_split": eval_split}), seed)
        if eval_split == "seen":
            yield "train", _different(source, count)
        yield eval_split, [source.draft("eval", index) for index in range(count)]


def _different(source: _DrawnSource, count: int) -> list[Draft]:
    found: dict[str, Draft] = {}
    for index in range(source.size("train")):
        draft = source.draft("train", index)
        found.setdefault(draft.identity, draft)
        if len(found) == count:
            return list(found.values())
    raise ConfigError(
        f"--games {count}: only {len(found)} different training games were found; lower it or allow larger games"
    )


def _identity(draft: Draft) -> str:
    return draft.identity
