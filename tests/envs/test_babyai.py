"""BabyAI: the view in words, an expert that copes with deviations, and splits without a common level."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import minigrid.core.constants as codes
import pytest
from minigrid.core.world_object import Ball, Box, Door, Key, Wall

from spear_fast.envs.babyai import LADDER, BabyAITasks
from spear_fast.envs.babyai.library import digest, make_level, restart
from spear_fast.envs.babyai.tasks import BabyAI
from spear_fast.envs.babyai.view import ACTIONS, COLORS, DOOR_STATES, THINGS, UNSEEN, WALL, describe, possible_actions
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.splits import SHARES
from spear_fast.errors import ConfigError, MissingDependencyError, TaskError


def make(*levels: str, seed: int = 0, **params: Any) -> BabyAITasks:
    sizes = {"num_train": 300, "num_eval": 6, "num_demo": 40}
    chosen = {"levels": list(levels)} if levels else {}
    tasks = make_task_set("babyai", sizes | chosen | params, seed)
    assert isinstance(tasks, BabyAITasks)
    return tasks


def random_policy(seed: int) -> Callable[[Any, Any], str]:
    random = Random(seed)
    return lambda _, episode: f"<action>{random.choice(episode.infos[-1]['admissible'])}</action>"


def empty_room() -> Any:
    """A level of 8 x 8 cells cleared of things, the agent at (3, 4) looking up."""
    env = make_level("GoToObj")
    restart(env, 0)
    for column in range(1, 7):
        for row in range(1, 7):
            env.grid.set(column, row, None)
    env.agent_pos, env.agent_dir = (3, 4), 3
    return env


def shown(env: Any) -> str:
    return describe(env.gen_obs()["image"], env.carrying)


def test_codes_are_those_of_minigrid() -> None:
    assert {name: codes.OBJECT_TO_IDX[name] for name in THINGS.values()} == {
        name: code for code, name in THINGS.items()
    }
    assert (codes.OBJECT_TO_IDX["unseen"], codes.OBJECT_TO_IDX["wall"]) == (UNSEEN, WALL)
    assert {name: code for code, name in enumerate(COLORS)} == codes.COLOR_TO_IDX
    assert {name: code for code, name in enumerate(DOOR_STATES)} == codes.STATE_TO_IDX


def test_view_names_things_by_their_distance_and_walls_by_direction() -> None:
    env = empty_room()
    assert shown(env) == "You see wall 4 ahead 3 left."
    env.grid.set(4, 2, Ball("red"))
    env.grid.set(1, 4, Key("blue"))
    env.grid.set(3, 3, Box("grey"))
    # A box does not hide what is behind it, but the wall in the line of the key is the first wall still.
    assert shown(env) == ("You see grey box 1 ahead, blue key 2 left, red ball 2 ahead 1 right, wall 4 ahead 3 left.")
    env.agent_dir = 1
    assert shown(env) == "You see blue key 2 right, wall 3 ahead 3 right."
    env.carrying = Key("green")
    assert shown(env).endswith(" You carry a green key.")


def test_walls_and_closed_doors_hide_what_is_behind() -> None:
    env = empty_room()
    for column in range(1, 7):
        env.grid.set(column, 3, Wall())
    env.grid.set(3, 3, Door("red", is_locked=True))
    env.grid.set(3, 2, Ball("red"))
    assert shown(env) == "You see locked red door 1 ahead, wall 3 left."
    env.grid.get(3, 3).is_locked = False
    assert shown(env) == "You see closed red door 1 ahead, wall 3 left."
    env.grid.get(3, 3).is_open = True
    assert shown(env) == "You see open red door 1 ahead, red ball 2 ahead, wall 4 ahead 3 left."


@pytest.mark.parametrize(
    ("ahead", "carried", "more"),
    [
        (None, None, ["go forward"]),
        (None, Key("red"), ["go forward", "drop"]),
        (Wall(), Key("red"), []),
        (Ball("red"), None, ["pick up"]),
        (Ball("red"), Key("red"), []),
        (Box("red"), None, ["pick up", "toggle"]),
        (Door("red", is_open=True), None, ["go forward", "toggle"]),
        (Door("red"), None, ["toggle"]),
        (Door("red", is_locked=True), None, []),
        (Door("red", is_locked=True), Key("blue"), []),
        (Door("red", is_locked=True), Key("red"), ["toggle"]),
    ],
)
def test_commands_that_change_something_are_listed(ahead: Any, carried: Any, more: list[str]) -> None:
    env = empty_room()
    env.grid.set(3, 3, ahead)
    env.carrying = carried
    assert possible_actions(env) == ["turn left", "turn right", *more]
    for command, action in ACTIONS.items():
        before = digest(env, with_agent=True), env.carrying
        if command not in possible_actions(env):
            env.step(env.actions[action])
            assert (digest(env, with_agent=True), env.carrying) == before


def test_command_that_is_not_listed_is_invalid_and_changes_nothing() -> None:
    env = make().make()

    async def run() -> None:
        text, first = await env.reset(seed=0, options={"split": "train", "index": 0})
        for message in ("turn left", "<action>turn</action>", "<action>drop</action>"):
            again, reward, terminated, truncated, info = await env.step(message)
            assert (again, reward) == (f"Invalid action. {text}", -0.1)
            assert not terminated and not truncated
            assert info.get("action_valid") is False and info.get("anchor") == first.get("anchor")

    asyncio.run(run())


@pytest.mark.parametrize("level", LADDER)
def test_expert_solves_every_game(level: str, play: Callable[..., Any]) -> None:
    tasks = make(level)
    for split in SHARES:
        for index in range(6):
            episode = play(tasks, split, index)
            assert episode.won and sum(episode.rewards) == 1.0
            assert all(info.get("action_valid", True) for info in episode.infos)
            assert episode.infos[0]["task_type"] == level


@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "PutNextLocalS5N3", "UnlockLocal", "GoToSeqS5R2"])
def test_expert_copes_with_deviations(level: str) -> None:
    tasks = make(level, num_eval=0, num_demo=0)
    for index in range(8):
        game, random = tasks.start("train", index), Random(index)
        for step in range(150):
            advice = game.expert()[1]
            assert advice in game.actions()
            assert game.expert()[1] == advice
            # Boxes stay closed: opening one destroys it, which no expert can mend.
            others = [each for each in game.actions() if each != "toggle"]
            outcome = game.act(random.choice(others) if step < 30 and random.random() < 0.5 else advice)
            assert outcome is not None
            if outcome.over:
                assert outcome.won
                break
        else:
            pytest.fail(f"the expert did not finish game {index}")


def test_expert_of_a_level_that_is_lost_says_so() -> None:
    game = make("PickupLoc", num_eval=0, num_demo=0).start("train", 0)
    for column in range(game.env.grid.width):
        for row in range(game.env.grid.height):
            if isinstance(game.env.grid.get(column, row), Ball | Box | Key):
                game.env.grid.set(column, row, None)
    with pytest.raises(TaskError, match="the BabyAI bot finds no way"):
        for _ in range(30):
            game.act(game.expert()[1])


def test_failure_ends_a_game_without_reward() -> None:
    tasks = make("OpenDoorsOrderN2Debug", num_eval=0, num_demo=0)
    outcomes: Counter[bool] = Counter()
    for index in range(12):
        game, random = tasks.start("train", index), Random(index)
        for _ in range(200):
            toggled = [each for each in game.actions() if each == "toggle"]
            outcome = game.act((toggled or [random.choice(game.actions())])[0])
            assert outcome is not None
            if outcome.over:
                assert (outcome.reward == 1.0) == outcome.won
                outcomes[outcome.won] += 1
                break
    assert outcomes[False] > 0


def test_random_play_gets_harder_along_the_ladder(play: Callable[..., Any]) -> None:
    rates = []
    for level in (LADDER[0], LADDER[3], LADDER[4]):
        tasks = make(level, num_eval=0, num_demo=0)
        rates.append(sum(play(tasks, "train", index, random_policy(index)).won for index in range(16)) / 16)
    assert rates[0] > rates[1] >= rates[2]
    assert rates[0] > 0.5 > 0.1 > rates[2]


def test_equal_seeds_give_equal_games_and_others_do_not() -> None:
    openings = [[make(seed=seed, num_eval=6).start(split, 5).opening() for split in SHARES] for seed in (0, 0, 1)]
    assert openings[0] == openings[1] != openings[2]


def test_games_are_those_that_were_drawn() -> None:
    tasks = make("GoToObjS6", "PickupLoc")
    levels = Counter()
    for index in range(12):
        drawn, game = tasks.drawn("train", index), tasks.start("train", index)
        assert isinstance(game, BabyAI)
        assert digest(game.env, with_agent=True) == drawn.identity
        levels[game.task_type] += 1
    assert set(levels) == {"GoToObjS6", "PickupLoc"}


def test_splits_share_no_layout_and_eval_is_distinct() -> None:
    tasks = make("GoToObjS6", num_train=150, num_eval=24)
    pools = {split: [tasks.drawn(split, index) for index in range(tasks.size(split))] for split in SHARES}
    layouts = {split: {drawn.layout for drawn in pool} for split, pool in pools.items()}
    assert not layouts["train"] & layouts["eval"]
    assert not layouts["train"] & layouts["demo"]
    assert not layouts["eval"] & layouts["demo"]
    assert len({drawn.identity for drawn in pools["eval"]}) == 24


def test_states_repeat_within_a_group(play: Callable[..., Any]) -> None:
    tasks = make()
    shared = 0
    for index in range(4):
        group = [play(tasks, "train", index, random_policy(sample)) for sample in range(4)]
        seen = Counter(info["anchor"] for episode in group for info in episode.infos[:-1])
        shared += sum(count > 1 for count in seen.values())
        assert len({episode.observations[0] for episode in group}) == 1
    assert shared > 40


def test_unknown_level_and_none_at_all_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"no BabyAI level 'GoToRedBal'; the nearest is 'GoToRedBall'"):
        make("GoToRedBal")
    with pytest.raises(ConfigError, match=r"task\.params\.levels=\[\]"):
        make(levels=[])


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[babyai\]"):
        make()


def test_nothing_is_printed_or_warned_and_the_library_waits_until_it_is_used() -> None:
    # A fresh interpreter, because what the libraries say is said on import.
    code = (
        "import sys, spear_fast.envs.babyai as b; assert 'minigrid' not in sys.modules; "
        "tasks = b.BabyAITasks(b.BabyAIParams(levels=['PutNextLocalS5N3'], num_eval=4), 0); "
        "game = tasks.start('train', 0); game.act(game.expert()[1])"
    )
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
