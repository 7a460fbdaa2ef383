"""The ALFWorld task set: solvable games of six types, disjoint splits, a ladder, and game files."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spear_fast.envs.alfworld import AlfworldParams, AlfworldTasks
from spear_fast.envs.alfworld.fast_game import FastGame
from spear_fast.envs.alfworld.generator import Sizes, draw
from spear_fast.envs.alfworld.installed import TASK_TYPES, installed
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.splits import unit_hash
from spear_fast.errors import ConfigError, MissingDependencyError, TaskError

EASY: dict[str, Any] = {"max_receptacles": 4, "min_extra_objects": 0, "max_extra_objects": 2, "max_plan_length": 4}


def make(seed: int = 0, **params: Any) -> AlfworldTasks:
    sizes = {"num_train": 60, "num_eval": 16, "num_demo": 30}
    tasks = make_task_set("alfworld", sizes | params, seed)
    assert isinstance(tasks, AlfworldTasks)
    return tasks


def opening(tasks: AlfworldTasks, split: Any, index: int) -> str:
    return tasks.start(split, index).opening()


def random_policy(seed: int) -> Callable[[Any, Any], str]:
    random = Random(seed)
    return lambda _, episode: f"<action>{random.choice(episode.infos[-1]['admissible'])}</action>"


@pytest.fixture(scope="module")
def tasks() -> AlfworldTasks:
    return make()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("games") / "new"
    lines = AlfworldTasks.write_games(AlfworldParams(**EASY), count=10, seed=4, out=out)
    assert [line.split(":")[0] for line in lines[:3]] == ["train", "seen", "unseen"]
    assert "not the games of the ALFWorld benchmark" in lines[-1]
    return out


@pytest.mark.parametrize("split", ["train", "eval", "demo"])
def test_expert_wins_every_type_in_every_split(play: Any, tasks: AlfworldTasks, split: str) -> None:
    types = Counter()
    for index in range(min(24, tasks.size(split))):
        episode = play(tasks, split, index)
        assert episode.won and episode.rewards[-1] == 1.0
        assert all(info["action_valid"] for info in episode.infos[1:])
        assert len(episode.messages) <= 15
        types[episode.infos[0]["task_type"]] += 1
    assert len(types) == len(TASK_TYPES) or split == "eval"


def test_expert_wins_each_type_alone(play: Any) -> None:
    for task_type in TASK_TYPES:
        only = make(task_types=[task_type], num_eval=0, num_demo=0)
        episodes = [play(only, "train", index) for index in range(5)]
        assert all(episode.won for episode in episodes)
        assert {episode.infos[0]["task_type"] for episode in episodes} == {task_type}


def test_random_play_feels_the_ladder(play: Any) -> None:
    wins = []
    for rung in ({}, EASY):
        ladder = make(num_eval=0, num_demo=0, task_types=["pick_and_place_simple"], **rung)
        wins.append(sum(play(ladder, "train", index, random_policy(index)).won for index in range(40)))
    assert wins[0] <= 4 and wins[1] >= wins[0] + 5


def test_first_observation_and_an_invalid_message(tasks: AlfworldTasks) -> None:
    env = tasks.make()
    text, info = asyncio.run(env.reset(seed=0, options={"split": "train", "index": 0}))
    assert text.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.")
    assert "\n\nYour task is to: " in text and "UNKNOWN" not in text
    assert "help" not in info["admissible"] and "look" in info["admissible"]
    observation, reward, over, _, info = asyncio.run(env.step("<action>take the moon</action>"))
    assert observation.startswith("Invalid action.") and not over
    assert reward == -tasks.params.invalid_penalty and info["action_valid"] is False


def test_anchor_is_the_text_last_read(tasks: AlfworldTasks) -> None:
    game = tasks.start("train", 0)
    assert game.anchor() == game.opening()
    outcome = game.act("inventory")
    assert outcome is not None and game.anchor() == outcome.text == "You are not carrying anything."
    assert game.act("fly") is None and game.anchor() == outcome.text
    again = tasks.start("train", 0)
    again.act("look")
    again.act("inventory")
    assert again.anchor() == game.anchor()


def test_splits_have_no_common_game_and_scenes_as_promised() -> None:
    for eval_split in ("seen", "unseen"):
        tasks = make(eval_split=eval_split, num_eval=40)
        games = {
            split: [opening(tasks, split, index) + describe(tasks, split, index) for index in range(tasks.size(split))]
            for split in ("train", "eval", "demo")
        }
        assert len(set(games["eval"])) == 40
        assert not set(games["eval"]) & {*games["train"], *games["demo"]}
        assert not set(games["demo"]) & set(games["train"])
        scenes = {tasks._source.draft("eval", index).scene.number for index in range(40)}  # type: ignore[union-attr]
        allowed = installed().test_scenes if eval_split == "unseen" else installed().train_scenes
        assert scenes <= set(allowed)
    assert not set(installed().test_scenes) & set(installed().train_scenes)


def describe(tasks: AlfworldTasks, split: Any, index: int) -> str:
    game = tasks.start(split, index)
    assert isinstance(game, FastGame)
    return game._engine.state.place.__repr__()


def test_equal_seeds_give_equal_games_whatever_the_sizes() -> None:
    a, b, other = make(seed=1), make(seed=1, num_train=7, num_eval=4), make(seed=2)
    for index in range(4):
        assert opening(a, "train", index) == opening(b, "train", index)
        assert opening(a, "eval", index) == opening(b, "eval", index)
    assert [opening(a, "train", i) for i in range(6)] != [opening(other, "train", i) for i in range(6)]


def test_ladder_holds_its_bounds() -> None:
    data = installed()
    for seed in range(200):
        draft = draw(Random(seed), TASK_TYPES, data.train_scenes, Sizes((2, 3), 6))
        if draft is not None:
            goal = 2 if draft.task_type in ("pick_two_obj_and_place", "look_at_obj_in_light") else 1
            assert 2 <= len(draft.items) - goal <= 3
            assert len(draft.receptacles) <= 6
            assert {item.receptacle for item in draft.items} <= {receptacle.id for receptacle in draft.receptacles}


def test_plans_are_as_short_as_asked(play: Any) -> None:
    short = make(**EASY, num_eval=8)
    assert max(len(play(short, "eval", index).messages) for index in range(8)) <= 4


def test_written_games_are_played_again(play: Any, written: Path) -> None:
    files = sorted(written.rglob("game.tw-pddl"))
    assert len(files) == 30
    tasks = make(games=str(written), num_eval=100)
    assert {split: tasks.size(split) for split in ("train", "eval", "demo")} == {"train": 8, "eval": 10, "demo": 2}
    for split in ("train", "eval", "demo"):
        assert all(play(tasks, split, index).won for index in range(tasks.size(split)))
    data = json.loads(files[0].read_text())
    assert set(data) == {"pddl_domain", "grammar", "pddl_problem", "solvable", "walkthrough"}
    assert data["solvable"] is True and "UNKNOWN GOAL" not in data["grammar"]
    trajectory = json.loads((files[0].parent / "traj_data.json").read_text())
    assert trajectory["task_type"] in TASK_TYPES and "not a game of the ALFWorld benchmark" in trajectory["generator"]
    with pytest.raises(ConfigError, match="is not empty"):
        AlfworldTasks.write_games(AlfworldParams(), count=1, seed=0, out=written)


def test_walkthroughs_win(written: Path) -> None:
    tasks = make(games=str(written))
    files = sorted((written / "unseen").rglob("game.tw-pddl"))
    # By a hash of the path, as paths begin with the task type, and a part of the games shall hold all types.
    files.sort(key=lambda path: unit_hash(path.relative_to(written).as_posix()))
    for index, path in enumerate(files):
        commands = json.loads(path.read_text())["walkthrough"]
        game = tasks.start("eval", index)
        outcomes = [game.act(each) for each in commands]
        assert [outcome.won for outcome in outcomes if outcome] == [False] * (len(commands) - 1) + [True]


def test_official_layout_is_read(written: Path, tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("seen", "valid_seen"), ("unseen", "valid_unseen")):
        for folder in (written / split).iterdir():
            shutil.copytree(folder, tmp_path / name / folder.name / "trial_T2026")
    unseen = sorted((tmp_path / "valid_unseen").rglob("game.tw-pddl"))
    data = json.loads(unseen[0].read_text())
    unseen[0].write_text(json.dumps(data | {"solvable": False}))
    unseen[1].parent.parent.rename(tmp_path / "valid_unseen" / "pick_and_place_with_movable_recep-Pen-Mug-Desk-1")
    tasks = make(games=str(tmp_path), num_eval=100)
    assert (tasks.size("train"), tasks.size("eval")) == (8, 8)
    assert opening(tasks, "eval", 0) in {opening(make(games=str(written)), "eval", index) for index in range(10)}


def test_damaged_game_files_are_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.params\.games=.*no solvable game"):
        make(games=str(tmp_path))
    for content, message in (("{", "cannot be read"), ('{"solvable": true}', "'pddl_problem' is missing")):
        shutil.copytree(written, tmp_path / "copy", dirs_exist_ok=True)
        for path in (tmp_path / "copy").rglob("game.tw-pddl"):
            path.write_text(content)
        with pytest.raises(TaskError, match=message):
            make(games=str(tmp_path / "copy")).start("train", 0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"task_types": []}, "at least one task type"),
        ({"task_types": ["pick_two_obj_and_place"] * 2}, "each of them once"),
        ({"task_types": ["cook"]}, "cook"),
        ({"max_receptacles": 3}, "greater than or equal to 4"),
        ({"min_extra_objects": 9, "max_extra_objects": 5}, "min_extra_objects=9"),
    ],
)
def test_wrong_params_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**params)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed.cache_clear()
    monkeypatch.setitem(sys.modules, "alfworld", None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps alfworld"):
        make()
    monkeypatch.undo()
    assert make().size("train") == 60


def test_missing_real_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(MissingDependencyError, match=r"engine=textworld.*spear-fast\[alfworld\]"):
        make(engine="textworld")
