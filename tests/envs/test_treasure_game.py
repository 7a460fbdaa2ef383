"""The treasure game: solvable, neither trivial nor hopeless, with states that repeat within a group."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_fast.envs.game import GameEnv
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.splits import SHARES
from spear_fast.envs.treasure import TreasureTasks
from spear_fast.envs.treasure_map import ROOM_NAMES, State, TreasureMap, generate_map, layout_text
from spear_fast.errors import ConfigError, TaskError

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def make(seed: int = 0, **params: Any) -> TreasureTasks:
    tasks = make_task_set("treasure", {"num_train": 300, "num_eval": 40, "num_demo": 100} | params, seed)
    assert isinstance(tasks, TreasureTasks)
    return tasks


def random_policy(seed: int) -> Callable[[Any, Any], str]:
    random = Random(seed)
    return lambda _, episode: f"<action>{random.choice(episode.infos[-1]['admissible'])}</action>"


def start(tasks: TreasureTasks, index: int = 0) -> tuple[GameEnv, str, Any]:
    env = tasks.make()
    return env, *asyncio.run(env.reset(seed=0, options={"split": "train", "index": index}))


def shortest_by_trying(game: TreasureMap) -> int:
    """Fewest actions to win, found by growing the set of reachable states one action at a time."""
    reachable, count = {game.start}, 0
    while None not in reachable:
        reachable = {game.after(state, action) for state in reachable if state for action in game.actions(state)}
        count += 1
    return count


maps = st.builds(
    lambda seed, rooms, key: generate_map(Random(seed), rooms, key),
    st.integers(0, 2**32),
    st.integers(3, len(ROOM_NAMES)),
    st.booleans(),
)


@settings(max_examples=60)
@given(maps)
def test_maps_are_consistent_and_solved_in_the_fewest_steps(game: TreasureMap) -> None:
    for room, exits in enumerate(game.exits):
        assert exits
        for direction, other in exits.items():
            assert game.exits[other][OPPOSITE[direction]] == room
    assert len(set(game.names)) == len(game.exits)
    assert game.chest != 0 and game.key != 0 and game.chest != game.key
    solution = game.shortest_solution(game.start)
    assert len(solution) == shortest_by_trying(game)
    state: State | None = game.start
    for action in solution:
        assert state is not None and action in game.actions(state)
        state = game.after(state, action)
    assert state is None


@settings(max_examples=60)
@given(maps, st.randoms())
def test_layout_ignores_the_numbers_of_ordinary_rooms(game: TreasureMap, random: Random) -> None:
    ordinary = list(range(3, len(game.exits)))
    renumbered = dict(enumerate([0, 1, 2, *random.sample(ordinary, len(ordinary))]))
    exits: list[dict[str, int]] = [{} for _ in game.exits]
    for room, ways in enumerate(game.exits):
        exits[renumbered[room]] = {way: renumbered[other] for way, other in ways.items()}
    assert layout_text(tuple(exits), with_key=game.key is not None) == game.layout


def test_map_without_a_way_to_the_chest_is_an_error() -> None:
    game = TreasureMap(("attic", "barn", "cave"), ({"east": 1}, {"west": 0}, {}), chest=2, key=1, layout="torn")
    with pytest.raises(ValueError, match="'torn' cannot be solved"):
        game.shortest_solution(game.start)


def test_layout_tells_puzzles_apart() -> None:
    row = ({"east": 1}, {"west": 0, "east": 2}, {"west": 1})
    turned = ({"north": 1}, {"south": 0, "north": 2}, {"south": 1})
    chest_first = ({"east": 2}, {"west": 2}, {"west": 0, "east": 1})
    layouts = {layout_text(exits, with_key) for exits in (row, turned, chest_first) for with_key in (True, False)}
    assert len(layouts) == 6


@pytest.mark.parametrize("params", [{}, {"with_key": False}, {"num_rooms": 10}, {"num_rooms": 16, "max_steps": 12}])
def test_expert_solves_every_game(params: dict[str, Any], play: Callable[..., Any]) -> None:
    tasks = make(**params)
    for split in SHARES:
        for index in range(40):
            episode = play(tasks, split, index)
            assert episode.won, episode.messages
            assert sum(episode.rewards) == 1.0
            assert all(info.get("action_valid", True) for info in episode.infos)


def test_random_play_gets_harder_with_more_rooms(play: Callable[..., Any]) -> None:
    rates = []
    for num_rooms in (3, 5, 10):
        tasks = make(num_rooms=num_rooms)
        wins = [play(tasks, "train", index, random_policy(index)).won for index in range(100)]
        rates.append(sum(wins) / len(wins))
    assert 0 < rates[2] < rates[1] < rates[0] < 1


def test_states_repeat_within_a_group(play: Callable[..., Any]) -> None:
    tasks = make()
    shared = 0
    for index in range(10):
        group = [play(tasks, "train", index, random_policy(sample)) for sample in range(8)]
        # What the policy saw before each action: all but the last state.
        seen = Counter(info["anchor"] for episode in group for info in episode.infos[:-1])
        shared += sum(count > 1 for count in seen.values())
        assert len({episode.observations[0] for episode in group}) == 1
        assert len(seen) > 1
    assert shared > 30


def test_equal_anchors_are_equal_states() -> None:
    tasks = make(num_rooms=8)
    game = tasks.start("train", 0)
    random, anchors = Random(0), {}
    for _ in range(15):
        game.act(random.choice([each for each in game.actions() if each != "open chest"]))
        assert anchors.setdefault(game.anchor(), game.state) == game.state


def test_splits_share_no_layout_and_eval_is_distinct() -> None:
    tasks = make(num_rooms=4)
    pools = {split: [tasks.game(split, index) for index in range(tasks.size(split))] for split in SHARES}
    layouts = {split: {game.layout for game in games} for split, games in pools.items()}
    assert not layouts["train"] & layouts["eval"]
    assert not layouts["train"] & layouts["demo"]
    assert not layouts["eval"] & layouts["demo"]
    assert len({(game.layout, game.names) for game in pools["eval"]}) == 40


def test_games_depend_on_seed_and_index_only() -> None:
    first, second = make(), make(num_train=5)
    assert [first.game("train", index) for index in (4, 2)] == [second.game("train", index) for index in (4, 2)]
    assert first.game("eval", 3) == second.game("eval", 3)
    assert first.game("train", 0) != make(seed=1).game("train", 0)


@pytest.mark.parametrize(
    "text", ["", "go north", "<action>fly</action>", "<action></action>", "<action>open chest</action>"]
)
def test_invalid_action_changes_nothing_and_costs(text: str) -> None:
    env, observation, first = start(make(invalid_penalty=0.25))
    shown, reward, terminated, truncated, info = asyncio.run(env.step(text))
    assert shown == f"Invalid action. {observation}"
    assert (reward, terminated, truncated) == (-0.25, False, False)
    assert info["anchor"] == first["anchor"] == observation
    assert info["admissible"] == first["admissible"]
    assert (info["action_valid"], info["answered"], info["won"]) == (False, False, False)


def test_commands_may_be_written_loosely() -> None:
    env, _, info = start(make())
    first = info["admissible"][0].upper().replace(" ", "  ")
    _, reward, _, _, info = asyncio.run(env.step(f"I go.<action> {first}\n</action>"))
    assert (reward, info["action_valid"]) == (0.0, True)


def test_observation_tells_the_whole_state() -> None:
    tasks = make(num_rooms=3)
    game = tasks.game("train", 0)
    env, observation, _ = start(tasks)
    shown = [observation]
    for _ in range(len(game.shortest_solution(game.start))):
        shown.append(asyncio.run(env.step(env.expert()))[0])
    story = "\n".join(shown)
    assert "You see a key." in story and "You hold the key." in story and "You see a chest." in story
    assert shown[-1] == "You found the treasure."
    assert all(f"Actions: {', '.join(game.actions(game.start))}" in text for text in shown[:1])


def test_locked_chest_cannot_be_opened() -> None:
    game = generate_map(Random(0), 4, with_key=True)
    assert "open chest" not in game.actions(State(game.chest, has_key=False))
    assert "open chest" in game.actions(State(game.chest, has_key=True))


def test_game_is_truncated_after_max_steps() -> None:
    env, _, _ = start(make(max_steps=5))
    results = [asyncio.run(env.step("<action>wait</action>")) for _ in range(5)]
    assert [truncated for _, _, _, truncated, _ in results] == [False] * 4 + [True]
    assert not any(terminated for _, _, terminated, _, _ in results)


def test_win_on_the_last_step_is_a_win(play: Callable[..., Any]) -> None:
    tasks = make(max_steps=4)
    episode = play(tasks, "train", 0)
    assert (len(episode.messages), episode.terminated, episode.truncated, episode.won) == (4, True, False, True)


def test_impossible_step_limit_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"task\.params\.num_eval=40: only 0 different"):
        make(max_steps=3)


def test_use_before_reset_is_an_error() -> None:
    env = make().make()
    with pytest.raises(TaskError, match="before reset"):
        asyncio.run(env.step("<action>go north</action>"))
    with pytest.raises(TaskError, match="before reset"):
        env.expert()
