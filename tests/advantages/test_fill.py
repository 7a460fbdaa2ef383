"""Per-token advantages of whole groups against a loop over turns and tokens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.advantages import fill
from spear_fast.advantages.step_group import step_groups
from spear_fast.types import Group, Status, Task, Trajectory, Turn
from spear_kernels.discounted_return import discounted_returns_reference
from spear_kernels.group_advantage import group_advantages_reference
from spear_kernels.step_advantage import step_advantages_reference

TASK = Task("treasure", "train", 0, seed=0)
TURN = st.tuples(
    st.integers(0, 3), st.integers(1, 3), st.sampled_from([None, "hall", "cellar"]), st.sampled_from([0.0, 0.5, 1.0])
)
TRAJECTORY = st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.lists(TURN, max_size=4))
GROUPS = st.lists(st.lists(TRAJECTORY, max_size=4), max_size=4)


def trajectory(reward: float, turns: list[tuple[int, int, str | None, float]], uid: int) -> Trajectory:
    made = Trajectory(TASK, 0, 0, uid, 0, tokens=[1], action_mask=[False], reward=reward)
    for observed, sampled, anchor, turn_reward in turns:
        made.tokens += [2] * observed + [3] * sampled
        made.action_mask += [False] * observed + [True] * sampled
        made.turns.append(Turn(len(made.tokens) - sampled, len(made.tokens), anchor, turn_reward))
    return made


def build(plan: list[list[tuple[float, list[tuple[int, int, str | None, float]]]]]) -> list[Group]:
    return [
        Group(
            group_id, TASK, [trajectory(reward, turns, 100 * group_id + i) for i, (reward, turns) in enumerate(members)]
        )
        for group_id, members in enumerate(plan)
    ]


def fill_with(groups: list[Group], **settings: object) -> dict[str, float]:
    defaults = {"estimator": "grpo", "std_norm": False, "step_weight": 1.0, "gamma": 0.95, "step_std_norm": True}
    return fill(groups, **{**defaults, **settings})  # type: ignore[arg-type]


def episode_advantages(groups: list[Group], std_norm: bool) -> dict[int, float]:
    flat = [(t, group.group_id) for group in groups for t in group.trajectories]
    rewards = torch.tensor([t.reward for t, _ in flat], dtype=torch.float64)
    values = group_advantages_reference(rewards, torch.tensor([g for _, g in flat]), std_norm)
    return {t.uid: float(value) for (t, _), value in zip(flat, values, strict=True)}


def returns_of(turns: list[Turn], gamma: float) -> list[float]:
    rewards = torch.tensor([turn.reward for turn in turns], dtype=torch.float64)
    return discounted_returns_reference(rewards, torch.zeros(len(turns), dtype=torch.int64), gamma).tolist()


@given(GROUPS, st.booleans())
def test_grpo_puts_one_number_on_all_action_tokens(plan: list, std_norm: bool) -> None:
    groups = build(plan)
    fill_with(groups, std_norm=std_norm)
    expected = episode_advantages(groups, std_norm)
    for member in (t for group in groups for t in group.trajectories):
        wanted = [expected[member.uid] if is_action else 0.0 for is_action in member.action_mask]
        assert member.advantages is not None and member.advantages.dtype == np.float32
        np.testing.assert_allclose(member.advantages, np.array(wanted), rtol=1e-6, atol=1e-8)


@given(GROUPS, st.booleans(), st.booleans(), st.floats(0, 2), st.floats(0, 1))
def test_gigpo_adds_the_step_advantage_of_each_turn(
    plan: list, std_norm: bool, step_std_norm: bool, step_weight: float, gamma: float
) -> None:
    groups = build(plan)
    fill_with(
        groups, estimator="gigpo", std_norm=std_norm, step_std_norm=step_std_norm, step_weight=step_weight, gamma=gamma
    )
    expected = episode_advantages(groups, std_norm)
    steps = [
        (group.group_id, t, turn, returns_of(t.turns, gamma)[i])
        for group in groups
        for t in group.trajectories
        for i, turn in enumerate(t.turns)
    ]
    labels = step_groups([s[0] for s in steps], [s[2].anchor for s in steps])
    returns = torch.tensor([s[3] for s in steps], dtype=torch.float64)
    values = step_advantages_reference(returns, torch.from_numpy(labels), step_std_norm).tolist()
    wanted = {t.uid: np.zeros(len(t.tokens)) for group in groups for t in group.trajectories}
    for (_, member, turn, _), value in zip(steps, values, strict=True):
        for token in range(turn.start, turn.end):
            wanted[member.uid][token] = expected[member.uid] + step_weight * value
    for member in (t for group in groups for t in group.trajectories):
        assert member.advantages is not None
        np.testing.assert_allclose(member.advantages, wanted[member.uid], rtol=1e-6, atol=1e-6)


@given(GROUPS)
def test_statistics(plan: list) -> None:
    groups = build(plan)
    stats = fill_with(groups, estimator="gigpo")
    filled = [t for group in groups for t in group.trajectories]
    if not filled:
        assert stats == {}
        return
    actions = [abs(float(a)) for t in filled for a, m in zip(t.advantages, t.action_mask, strict=True) if m]  # type: ignore[arg-type]
    nonempty = [group for group in groups if group.trajectories]
    silent = [group for group in nonempty if all((t.advantages == 0).all() for t in group.trajectories)]  # type: ignore[union-attr]
    assert stats["advantage/abs_mean"] == pytest.approx(sum(actions) / max(len(actions), 1), abs=1e-6)
    assert stats["advantage/zero_groups_frac"] == pytest.approx(len(silent) / len(nonempty))
    anchored = any(turn.anchor for t in filled for turn in t.turns)
    assert ("advantage/anchor_group_size_mean" in stats) == anchored


def test_filtered_trajectories_count_towards_the_mean() -> None:
    groups = build([[(1.0, [(0, 1, None, 0.0)]), (0.0, [(0, 1, None, 0.0)])]])
    groups[0].trajectories[1].filtered = "overlong"
    fill_with(groups)
    np.testing.assert_array_equal(groups[0].trajectories[0].advantages, [0.0, 0.5])  # type: ignore[arg-type]


def test_unusable_trajectories_are_refused() -> None:
    groups = build([[(1.0, [(0, 1, None, 0.0)])]])
    groups[0].trajectories[0].status = Status.TOOL_TIMEOUT
    with pytest.raises(ValueError, match="uid=0 has status='tool_timeout'"):
        fill_with(groups)


def test_gigpo_refuses_action_tokens_outside_turns() -> None:
    groups = build([[(1.0, [(1, 2, "hall", 0.0)])]])
    broken = copy.deepcopy(groups)
    broken[0].trajectories[0].turns[0].end -= 1
    fill_with(groups, estimator="gigpo")
    with pytest.raises(ValueError, match="action token at 3 outside its turns"):
        fill_with(broken, estimator="gigpo")


def test_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="estimator='rloo'"):
        fill_with([], estimator="rloo")
