"""Rewards against the formula R = R_outcome + mu * R_tool."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.errors import TaskError
from spear_fast.rewards import score
from spear_fast.types import Group, Status, Task, Trajectory, Turn

TASK = Task("calculator", "train", 17, seed=3)
OUTCOMES = st.sampled_from([-1.0, 0.0, 0.25, 1.0])


def trajectory(outcome: float, calls: int, num_turns: int = 1, **fields: object) -> Trajectory:
    turns = [Turn(start=i + 1, end=i + 2) for i in range(num_turns)]
    made = Trajectory(TASK, 0, 0, 0, 0, turns=turns, num_tool_calls=calls, outcome_reward=outcome)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def score_one(made: Trajectory, **settings: object) -> dict[str, float]:
    defaults = {"mu": 1.0, "variant": "graded", "count": "tool_calls", "per_call": 0.1}
    return score([Group(0, TASK, [made])], **{**defaults, **settings})  # type: ignore[arg-type]


def slow_intrinsic(outcome: float, calls: int, per_call: float, variant: str) -> float:
    if variant == "graded-negative" and outcome > 0:
        return 1.0 if calls > 0 else 0.0
    reward = 0.0
    for _ in range(calls):
        reward += per_call
    return 1.0 if reward > 1.0 else reward


@given(
    OUTCOMES,
    st.integers(0, 30),
    st.integers(0, 30),
    st.floats(0, 1),
    st.sampled_from(["graded", "graded-negative"]),
    st.sampled_from(["tool_calls", "turns"]),
    st.sampled_from([0.05, 0.1, 0.5]),
)
def test_reward_is_the_formula(
    outcome: float, calls: int, num_turns: int, mu: float, variant: str, count: str, per_call: float
) -> None:
    made = trajectory(outcome, calls, num_turns)
    score_one(made, mu=mu, variant=variant, count=count, per_call=per_call)
    counted = calls if count == "tool_calls" else num_turns
    intrinsic = slow_intrinsic(outcome, counted, per_call, variant)
    assert made.intrinsic_reward == pytest.approx(intrinsic, abs=1e-12)
    assert made.reward == pytest.approx(outcome + mu * intrinsic, abs=1e-12)


def test_variants_differ_only_for_successes() -> None:
    won, lost = trajectory(1.0, 3), trajectory(0.0, 3)
    for made in (won, lost):
        score_one(made, variant="graded-negative")
    assert (won.intrinsic_reward, lost.intrinsic_reward) == pytest.approx((1.0, 0.3))


def test_statistics_are_means_over_usable_trajectories() -> None:
    won = trajectory(1.0, 4, success=True)
    lost = trajectory(0.0, 1)
    broken = trajectory(5.0, 9, status=Status.ENV_ERROR)
    groups = [Group(0, TASK, [won, broken]), Group(1, TASK, [lost])]
    stats = score(groups, mu=0.5, variant="graded", count="tool_calls", per_call=0.1)
    assert stats == pytest.approx(
        {
            "reward/mu": 0.5,
            "reward/mean": (1.2 + 0.05) / 2,
            "reward/outcome_mean": 0.5,
            "reward/intrinsic_mean": 0.25,
            "reward/success_rate": 0.5,
            "reward/tool_calls_mean": 2.5,
        }
    )
    assert (broken.reward, broken.intrinsic_reward) == (0.0, 0.0)


def test_no_usable_trajectory_gives_no_means() -> None:
    assert score_one(trajectory(1.0, 1, status=Status.ENGINE_ABORT), mu=0.25) == {"reward/mu": 0.25}


@pytest.mark.parametrize("outcome", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_the_task(outcome: float) -> None:
    with pytest.raises(TaskError, match="'calculator', split 'train', index 17"):
        score_one(trajectory(outcome, 0))


@pytest.mark.parametrize("setting", ["variant", "count"])
def test_unknown_settings_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}='other'"):
        score_one(trajectory(0.0, 0), **{setting: "other"})
