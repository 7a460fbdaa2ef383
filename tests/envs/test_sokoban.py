"""Sokoban: the rules, the solver against plain search, seeded puzzles, and a ladder that random play feels."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_fast.envs.registry import make_task_set
from spear_fast.envs.sokoban import SokobanTasks
from spear_fast.envs.sokoban.generator import Puzzle, generate
from spear_fast.envs.sokoban.room import DIRECTIONS, Room, State, canonical
from spear_fast.envs.sokoban.solver import count_pushes, solve
from spear_fast.envs.sokoban.tasks import Sokoban, SokobanParams
from spear_fast.envs.splits import SHARES
from spear_fast.errors import ConfigError, TaskError

LADDER: list[dict[str, Any]] = [
    {"max_pushes": 2, "max_steps": 30},
    {"min_pushes": 3, "max_pushes": 8, "max_steps": 30},
    {"num_boxes": 2, "min_pushes": 5, "max_pushes": 12, "max_steps": 40},
]


def make(seed: int = 0, **params: Any) -> SokobanTasks:
    tasks = make_task_set("sokoban", {"num_train": 300, "num_eval": 32, "num_demo": 60} | params, seed)
    assert isinstance(tasks, SokobanTasks)
    return tasks


def read(grid: str) -> Puzzle:
    """The puzzle that `grid` shows."""
    rows = grid.split()
    cells = "".join(rows)
    place = {symbols: [cell for cell, each in enumerate(cells) if each in symbols] for symbols in ("#", "OS*", "X*")}
    room = Room(len(rows[0]), len(rows), frozenset(place["#"]), frozenset(place["OS*"]))
    return Puzzle(room, State(next(cell for cell, each in enumerate(cells) if each in "PS"), tuple(place["X*"])))


def play_game(grid: str, **params: Any) -> Sokoban:
    return Sokoban(read(grid), SokobanParams(**params))


def random_policy(seed: int) -> Callable[[Any, Any], str]:
    random = Random(seed)
    return lambda _, episode: f"<action>{random.choice(episode.infos[-1]['admissible'])}</action>"


def fewest_moves(puzzle: Puzzle) -> int | None:
    """Shortest solution found move by move, without any pruning."""
    reached, edge, count = {puzzle.start}, {puzzle.start}, 0
    while edge:
        if any(puzzle.room.solved(state) for state in edge):
            return count
        edge = {puzzle.room.after(state, direction) for state in edge for direction in DIRECTIONS} - reached
        reached |= edge
        count += 1
    return None


drawn = st.builds(
    lambda seed, boxes, walls: generate(Random(seed), 6, 5, boxes, walls, num_pulls=4),
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.integers(0, 3),
).filter(bool)


@settings(max_examples=40, deadline=None)
@given(drawn, st.randoms())
def test_solver_finds_the_fewest_moves_or_that_there_are_none(puzzle: Puzzle, random: Random) -> None:
    state = puzzle.start
    for move in puzzle.solution:
        assert not puzzle.room.solved(state)
        state = puzzle.room.after(state, move)
    assert puzzle.room.solved(state)
    assert len(puzzle.solution) == fewest_moves(puzzle)
    for _ in range(8):
        state = puzzle.room.after(state, random.choice(list(DIRECTIONS)))
    moves = solve(puzzle.room, state)
    assert fewest_moves(Puzzle(puzzle.room, state)) == (None if moves is None else len(moves))


@settings(max_examples=40, deadline=None)
@given(drawn)
def test_grid_shows_the_whole_puzzle_and_turning_it_changes_no_identity(puzzle: Puzzle) -> None:
    grid = puzzle.room.grid(puzzle.start)
    assert read(grid) == puzzle
    turned = "\n".join("".join(column) for column in zip(*reversed(grid.split()), strict=True))
    assert turned != grid
    assert read(turned).identity == puzzle.identity
    assert read(turned).layout == puzzle.layout
    assert canonical(puzzle.identity) == puzzle.identity


def test_layout_leaves_out_the_player_and_identity_does_not() -> None:
    left, right = read("##### #PXO# #___# #####"), read("##### #_XO# #P__# #####")
    other = read("##### #PX_# #__O# #####")
    assert left.layout == right.layout != other.layout
    assert left.identity != right.identity


def test_moves_push_one_box_and_are_valid_but_without_effect_when_blocked() -> None:
    game = play_game("###### #PX_O# #____# ######")
    for blocked in ("up", "left"):
        before = game.state
        outcome = game.act(blocked)
        assert outcome is not None
        assert (outcome.reward, outcome.over, game.state) == (0.0, False, before)
    outcome = game.act("right")
    assert outcome is not None
    assert outcome.text == "######\n#_PXO#\n#____#\n######"
    outcome = game.act("right")
    assert outcome is not None
    assert (outcome.reward, outcome.won, outcome.over) == (1.0, True, True)


def test_two_boxes_in_a_row_cannot_be_pushed() -> None:
    game = play_game("####### #PXX_O# #O____# #######")
    before = game.state
    game.act("right")
    assert game.state == before


def test_symbols_on_targets_and_the_rewards_of_boxes_and_steps() -> None:
    game = play_game("######## #PX_OXO# #______# ########", box_reward=0.5, step_penalty=0.125)
    rewards = []
    for move in ("right", "right", "right"):
        outcome = game.act(move)
        assert outcome is not None
        rewards.append(outcome.reward)
    # The third push is blocked by the second box, which leaves the first one on its target.
    assert rewards == [-0.125, 0.375, -0.125]
    assert game.anchor().split()[1] == "#__P*XO#"
    game = play_game("######## #P*_OX_# #______# ########", box_reward=0.5)
    outcome = game.act("right")
    assert outcome is not None
    assert outcome.reward == -0.5
    assert outcome.text.split()[1] == "#_SXOX_#"


def test_coordinates_count_from_the_inner_corner() -> None:
    game = play_game("###### #PX_O# #__#_# ######", view="coordinates")
    assert game.opening() == "P 1,1. X 1,2. O 1,4. # 2,3"


def test_unknown_command_is_invalid_and_changes_nothing() -> None:
    tasks = make()
    env = tasks.make()

    async def run() -> None:
        shown, first = await env.reset(seed=0, options={"split": "train", "index": 0})
        for message in ("up", "<action>push up</action>", "<action></action>"):
            text, reward, terminated, truncated, info = await env.step(message)
            assert (text, reward) == (f"Invalid action. {shown}", -0.1)
            assert not terminated and not truncated
            assert info.get("action_valid") is False and info.get("anchor") == first.get("anchor")

    asyncio.run(run())


def test_expert_of_a_state_that_is_lost_says_so() -> None:
    game = play_game("###### #P___# #_XO_# #____# ######")
    for move in ("right", "down"):
        game.act(move)
    with pytest.raises(TaskError, match="cannot be solved any more"):
        game.expert()


def test_solver_gives_up_at_its_limit() -> None:
    puzzle = read("####### #P____# #_X_X_# #_____# #__O_O# #######")
    with pytest.raises(OverflowError, match="first 2 positions"):
        solve(puzzle.room, puzzle.start, max_nodes=2)


@pytest.mark.parametrize("view", ["grid", "coordinates"])
@pytest.mark.parametrize("step", LADDER)
def test_expert_solves_every_game_in_the_fewest_moves(
    step: dict[str, Any], view: str, play: Callable[..., Any]
) -> None:
    tasks = make(**step, view=view, num_eval=16)
    for split in SHARES:
        for index in range(16):
            episode = play(tasks, split, index)
            puzzle = tasks.puzzle(split, index)
            assert episode.won and sum(episode.rewards) == 1.0
            assert len(episode.messages) == len(puzzle.solution)
            pushes = count_pushes(puzzle.room, puzzle.start, puzzle.solution)
            assert step.get("min_pushes", 1) <= pushes <= step["max_pushes"]


def test_expert_finishes_what_others_began() -> None:
    tasks = make(num_boxes=2)
    finished = 0
    for index in range(20):
        game, random = tasks.start("train", index), Random(index)
        for _ in range(3):
            game.act(random.choice(game.actions()))
        if not solve(tasks.puzzle("train", index).room, game.state):
            continue
        for _ in range(60):
            outcome = game.act(game.expert()[1])
            assert outcome is not None
            if outcome.over:
                finished += outcome.won
                break
        else:
            pytest.fail("the expert did not finish")
    assert finished > 5


def test_random_play_gets_harder_along_the_ladder(play: Callable[..., Any]) -> None:
    rates = []
    for step in LADDER:
        tasks = make(**step, num_eval=4)
        rates.append(sum(play(tasks, "train", index, random_policy(index)).won for index in range(100)) / 100)
    assert rates[0] > 2 * rates[1] and rates[1] >= rates[2]
    assert 0.1 < rates[0] < 0.6


def test_equal_seeds_give_equal_games_and_others_do_not() -> None:
    openings = [[make(seed).start(split, 5).opening() for split in SHARES] for seed in (0, 0, 1)]
    assert openings[0] == openings[1] != openings[2]
    assert len({make(num_train=size).start("train", 3).opening() for size in (4, 300)}) == 1


def test_splits_share_no_layout_and_eval_is_distinct() -> None:
    tasks = make(max_pushes=2)
    pools = {split: [tasks.puzzle(split, index) for index in range(tasks.size(split))] for split in SHARES}
    layouts = {split: {puzzle.layout for puzzle in puzzles} for split, puzzles in pools.items()}
    assert not layouts["train"] & layouts["eval"]
    assert not layouts["train"] & layouts["demo"]
    assert not layouts["eval"] & layouts["demo"]
    assert len({puzzle.identity for puzzle in pools["eval"]}) == 32


def test_states_repeat_within_a_group(play: Callable[..., Any]) -> None:
    tasks = make()
    shared = 0
    for index in range(10):
        group = [play(tasks, "train", index, random_policy(sample)) for sample in range(8)]
        seen = Counter(info["anchor"] for episode in group for info in episode.infos[:-1])
        shared += sum(count > 1 for count in seen.values())
        assert len({episode.observations[0] for episode in group}) == 1
    assert shared > 100


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_pushes": 6}, r"task\.params\.max_pushes=4 is below min_pushes=6"),
        ({"min_pushes": 3, "max_steps": 2}, r"task\.params\.max_steps=2 is below min_pushes=3"),
        ({"width": 5, "height": 5, "num_boxes": 4}, r"num_boxes=4 is too many for 8 cells without wall; use at most 3"),
        ({"width": 5, "height": 5, "wall_share": 0.0}, r"task\.params\.num_eval=32: only \d+ different problems"),
        ({"view": "picture"}, r"task\.params\.view='picture'"),
    ],
)
def test_wrong_params(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**params)
