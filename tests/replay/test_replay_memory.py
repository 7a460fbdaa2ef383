"""The replay memory over many steps against a plain-list simulation of the paper's rules."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spear_fast.errors import CheckpointError, ConfigError
from spear_fast.replay import ReplayMemory
from spear_fast.types import Group, Row, Task, Trajectory, Turn, row_uid

TASK = Task("calculator", "train", 0, seed=0)
MEMBER = st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([-0.5, 0.0, 0.25, 0.5]), st.integers(0, 1))
STEPS = st.lists(st.lists(st.lists(MEMBER, min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=8)
DEFAULTS = {
    "buffer_size": 2,
    "baseline_size": 6,
    "tolerate_steps": 3,
    "ripe_factor": 1.5,
    "require_tool_call": True,
    "recalibrate": "p50",
    "decay_weight": 0.5,
    "std_norm": False,
}


def memory(**changes: object) -> ReplayMemory:
    return ReplayMemory(**{**DEFAULTS, **changes})  # type: ignore[arg-type]


def build_step(version: int, plan: list[list[tuple[float, float, int]]]) -> tuple[list[Group], list[Row]]:
    groups, rows = [], []
    for group_id, members in enumerate(plan):
        group = Group(group_id, TASK, [])
        for sample, (reward, advantage, calls) in enumerate(members):
            uid = 10_000 * version + 100 * group_id + sample
            made = Trajectory(TASK, group_id, sample, uid, version, reward=reward, num_valid_tool_calls=calls)
            made.turns = [Turn(1, 3, action_valid=bool(calls))]
            group.trajectories.append(made)
            # Two action tokens around the trajectory's mean, so that a constant and a scaled advantage differ.
            advantages = np.array([0, advantage - 0.125, advantage + 0.125], dtype=np.float32)
            mask, tokens = np.array([False, True, True]), np.array([1, uid, 3], dtype=np.int32)
            old_logp = np.array([0, -0.5, -1], dtype=np.float32)
            rows.append(Row(uid, group_id, version, tokens, mask, old_logp, advantages, reward))
        groups.append(group)
    return groups, rows


class SlowMemory:
    """Lists and the paper's sentences."""

    def __init__(self, recalibrate: str, std_norm: bool) -> None:
        self.stored: list[tuple[Row, float]] = []
        self.means: list[float] = []
        self.stds: list[float] = []
        self.recalibrate, self.std_norm = recalibrate, std_norm

    def offer(self, plan: list[list[tuple[float, float, int]]], rows: list[Row]) -> None:
        flat = [member for members in plan for member in members]
        self.stored += [(row, a) for row, (_, a, calls) in zip(rows, flat, strict=True) if a > 0 and calls > 0]
        for members in plan:
            rewards = [reward for reward, _, _ in members]
            self.means.append(statistics.mean(rewards))
            self.stds.append(statistics.stdev(rewards) if len(rewards) > 1 else 1.0)
        self.means, self.stds = self.means[-6:], self.stds[-6:]

    def advantage(self, row: Row, stored: float) -> float:
        if self.recalibrate == "p50":
            centred = row.reward - statistics.median(self.means)
            scale = statistics.median(self.stds) if self.std_norm else 0.0
            return centred / (scale + 1e-6) if scale else centred
        return stored * (0.5 if self.recalibrate == "decay" else 1.0)

    def eligible(self, version: int) -> dict[int, float]:
        self.stored = [(row, a) for row, a in self.stored if version - row.version <= 3]
        recalibrated = {row.uid: self.advantage(row, a) for row, a in self.stored}
        return {uid: a for uid, a in recalibrated.items() if a > 1e-12}


UNIFORM_GROUPS = [[(1.0, 0.5, 1)] * 4, [(0.0, -0.5, 0)] * 2, [(0.0, -0.5, 0)] * 2]


@settings(max_examples=200)
@example([UNIFORM_GROUPS] * 2, "p50", True, 0)
@given(STEPS, st.sampled_from(["p50", "decay", "none"]), st.booleans(), st.integers(0, 2**40))
def test_many_steps_match_the_simulation(plans: list, recalibrate: str, std_norm: bool, seed: int) -> None:
    fast, slow = memory(recalibrate=recalibrate, std_norm=std_norm), SlowMemory(recalibrate, std_norm)
    for version, plan in enumerate(plans):
        eligible = slow.eligible(version)
        rows, stats = fast.draw(version, seed + version)
        assert (stats["replay/eligible"], stats["replay/size"]) == (len(eligible), len(slow.stored))
        if len(eligible) > 3:
            assert rows is not None and len(rows) == stats["replay/drawn"] == 2
            assert len({row.uid for row in rows}) == 2
            check_rows(rows, eligible, slow)
            assert stats["replay/advantage_mean"] == pytest.approx(statistics.mean(eligible[r.uid] for r in rows))
            assert stats["replay/age_mean_steps"] == statistics.mean(version - row.version for row in rows)
            slow.stored = []
        else:
            assert rows is None and stats["replay/drawn"] == 0
        if slow.means:
            assert stats["replay/baseline_p50_reward"] == pytest.approx(statistics.median(slow.means))
        groups, offered = build_step(version, plan)
        assert fast.offer(groups, offered)["replay/size"] == len(slow.stored) + num_admitted(plan)
        slow.offer(plan, offered)


def num_admitted(plan: list[list[tuple[float, float, int]]]) -> int:
    return sum(a > 0 and calls > 0 for members in plan for _, a, calls in members)


def check_rows(rows: list[Row], eligible: dict[int, float], slow: SlowMemory) -> None:
    stored = {row.uid: row for row, _ in slow.stored}
    for row in rows:
        advantage, original = eligible[row.uid], stored[row.uid]
        scaled = original.advantages * (0.5 if slow.recalibrate == "decay" else 1.0)
        wanted = np.where(row.action_mask, advantage, 0) if slow.recalibrate == "p50" else scaled
        np.testing.assert_allclose(row.advantages, wanted, rtol=1e-5)
        assert row.advantages.dtype == np.float32
        np.testing.assert_array_equal(row.tokens, original.tokens)
        np.testing.assert_array_equal(row.old_logp, original.old_logp)


def ripe_memory() -> ReplayMemory:
    made = memory(ripe_factor=1.0)
    made.offer(*build_step(0, [[(1.0, 0.5, 1)] * 5, [(0.0, -0.5, 1)] * 2, [(0.0, -0.5, 0)] * 2]))
    return made


def test_draws_depend_on_the_seed_alone() -> None:
    drawn = [ripe_memory().draw(1, seed)[0] for seed in (3, 3, 4, 5, 6, 7)]
    uids = [[row.uid for row in rows or []] for rows in drawn]
    assert uids[0] == uids[1]
    assert len({tuple(one) for one in uids}) > 1


def test_a_draw_empties_the_buffer_but_not_the_baseline() -> None:
    made = ripe_memory()
    assert made.draw(1, 0)[0] is not None
    rows, stats = made.draw(1, 0)
    assert rows is None
    assert (stats["replay/size"], stats["replay/baseline_p50_reward"]) == (0.0, 0.0)


def test_stored_rows_do_not_change_with_the_offered_ones() -> None:
    made = memory(ripe_factor=0.1, recalibrate="none")
    groups, rows = build_step(0, [[(1.0, 0.5, 1)]])
    made.offer(groups, rows)
    rows[0].advantages[:] = -9
    drawn, _ = made.draw(1, 0)
    assert drawn is not None and drawn[0].advantages.tolist() == [0.0, 0.375, 0.625]


def test_text_games_need_a_valid_action_instead() -> None:
    groups, rows = build_step(0, [[(1.0, 0.5, 0), (1.0, 0.5, 0)]])
    groups[0].trajectories[1].turns[0].action_valid = True
    assert memory(require_tool_call=True).offer(groups, rows)["replay/admitted"] == 0
    assert memory(require_tool_call=False).offer(groups, rows)["replay/admitted"] == 1


def test_groups_without_rows_still_enter_the_baseline() -> None:
    groups, _ = build_step(0, [[(0.0, 0.0, 0)] * 2, [(0.5, 0.0, 0)] * 2, [(1.0, 0.0, 0)] * 2])
    made = memory()
    made.offer(groups, [])
    assert made.draw(1, 0)[1]["replay/baseline_p50_reward"] == 0.5


@given(STEPS, st.sampled_from(["p50", "decay"]))
def test_a_restored_memory_goes_on_alike(plans: list, recalibrate: str) -> None:
    unbroken, restored = memory(recalibrate=recalibrate), memory(recalibrate=recalibrate)
    for version, plan in enumerate(plans):
        unbroken.offer(*build_step(version, plan))
    restored.load_state_dict(unbroken.state_dict())
    (rows, stats), (other_rows, other_stats) = (one.draw(len(plans), 5) for one in (unbroken, restored))
    assert stats == other_stats
    assert (rows is None) == (other_rows is None)
    for row, other in zip(rows or [], other_rows or [], strict=True):
        assert row.uid == other.uid
        np.testing.assert_array_equal(row.advantages, other.advantages)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="buffer_size=0"):
        memory(buffer_size=0)
    with pytest.raises(ConfigError, match="recalibrate='mean'"):
        memory(recalibrate="mean")
    with pytest.raises(CheckpointError, match=r"'model\.weight'"):
        memory().load_state_dict({"model.weight": np.zeros(1)})
    with pytest.raises(ValueError, match=r"uid=\[0\]"):
        memory().offer([], build_step(0, [[(1.0, 0.5, 1)]])[1])


def test_rows_of_one_trajectory_are_admitted_each_for_itself() -> None:
    made = Trajectory(TASK, 0, 0, 7, 0, reward=1.0, turns=[Turn(1, 2), Turn(3, 4, action_valid=False), Turn(5, 6)])
    made.row_starts = [0, 2, 4]
    rows = [
        Row(
            row_uid(7, part),
            group_id=0,
            version=0,
            tokens=np.array([1, part], dtype=np.int32),
            action_mask=np.array([False, True]),
            old_logp=np.zeros(2, dtype=np.float32),
            advantages=np.array([0, advantage], dtype=np.float32),
            reward=1.0,
        )
        for part, advantage in enumerate([0.5, 0.5, -0.5])
    ]
    # The second acted invalidly, the third has a negative advantage.
    games = memory(require_tool_call=False, ripe_factor=0.1, recalibrate="none")
    assert games.offer([Group(0, TASK, [made])], rows)["replay/admitted"] == 1
    restored = memory(ripe_factor=0.1, recalibrate="none")
    restored.load_state_dict(games.state_dict())
    drawn, _ = restored.draw(1, 0)
    assert drawn is not None and [row.uid for row in drawn] == [7]
    made.num_valid_tool_calls = 1
    assert memory().offer([Group(0, TASK, [made])], rows)["replay/admitted"] == 2
    with pytest.raises(ValueError, match=r"uid=\[8\]"):
        memory().offer([Group(0, TASK, [made])], [replace(rows[1], uid=row_uid(8, 1))])
