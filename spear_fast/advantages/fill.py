"""Fills the per-token advantages of a step's trajectories with the chosen estimator."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..types import Group, Trajectory
from .group import group_advantages
from .step_group import discounted_returns, mean_group_size, step_advantages, step_groups


def fill(
    groups: list[Group],
    *,
    estimator: Literal["grpo", "gigpo"],
    std_norm: bool,
    step_weight: float,
    gamma: float,
    step_std_norm: bool,
) -> dict[str, float]:
    """Set `Trajectory.advantages` (float32 [L], 0 outside action tokens) and return the statistics of `advantage/`.

    "grpo" gives every action token of a trajectory A_episode (`group_advantages` of `reward`). "gigpo" adds
    `step_weight` * A_step of the token's turn, from returns of `Turn.reward` discounted by `gamma` per turn.
    `step_weight`, `gamma` and `step_std_norm` are read by "gigpo" only. Trajectories that the filters marked count
    towards the mean of their group. Raises ValueError for an unknown estimator, an unusable trajectory, or (gigpo)
    action tokens outside the turns.
    """
    if estimator not in ("grpo", "gigpo"):
        raise ValueError(f"estimator={estimator!r} is unknown; use 'grpo' or 'gigpo'")
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    group_of = np.repeat(np.arange(len(groups)), [len(group.trajectories) for group in groups])
    if not trajectories:
        return {}
    _check_usable(trajectories)
    rewards = np.array([trajectory.reward for trajectory in trajectories], dtype=np.float64)
    episode = group_advantages(rewards, group_of, std_norm)
    stats: dict[str, float] = {}
    if estimator == "grpo":
        filled = [
            np.where(trajectory.action_mask, advantage, 0.0).astype(np.float32)
            for trajectory, advantage in zip(trajectories, episode, strict=True)
        ]
    else:
        filled, stats = _gigpo(trajectories, group_of, episode, step_weight, gamma, step_std_norm)
    for trajectory, advantages in zip(trajectories, filled, strict=True):
        trajectory.advantages = advantages
    num_tokens = sum(trajectory.num_action_tokens for trajectory in trajectories)
    return {**_statistics(filled, num_tokens, group_of), **stats}


def _gigpo(
    trajectories: list[Trajectory],
    group_of: np.ndarray,
    episode: np.ndarray,
    step_weight: float,
    gamma: float,
    step_std_norm: bool,
) -> tuple[list[np.ndarray], dict[str, float]]:
    turn_counts = [len(trajectory.turns) for trajectory in trajectories]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    labels = step_groups(np.repeat(group_of, turn_counts).tolist(), [turn.anchor for turn in turns])
    returns = np.concatenate(
        [discounted_returns(np.array([turn.reward for turn in trajectory.turns]), gamma) for trajectory in trajectories]
    )
    steps = step_weight * step_advantages(returns, labels, step_std_norm)
    steps_by_trajectory = np.split(steps, np.cumsum(turn_counts)[:-1])
    filled = [
        _spread(trajectory, advantage + own_steps)
        for trajectory, advantage, own_steps in zip(trajectories, episode, steps_by_trajectory, strict=True)
    ]
    has_anchors = bool((labels >= 0).any())
    return filled, {"advantage/anchor_group_size_mean": mean_group_size(labels)} if has_anchors else {}


def _spread(trajectory: Trajectory, turn_advantages: np.ndarray) -> np.ndarray:
    """Return float32 [L] with each turn's advantage on its action tokens."""
    advantages = np.zeros(len(trajectory.tokens), dtype=np.float32)
    outside = np.array(trajectory.action_mask, dtype=bool)
    for turn, advantage in zip(trajectory.turns, turn_advantages, strict=True):
        advantages[turn.start : turn.end][outside[turn.start : turn.end]] = advantage
        outside[turn.start : turn.end] = False
    if outside.any():
        raise ValueError(
            f"trajectory uid={trajectory.uid} has an action token at {int(outside.argmax())} outside its turns; "
            "add a Turn for every sampled message"
        )
    return advantages


def _check_usable(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        if not trajectory.status.usable:
            raise ValueError(
                f"trajectory uid={trajectory.uid} has status={trajectory.status.value!r}; remove unusable "
                "trajectories from their groups before the advantages"
            )


def _statistics(filled: list[np.ndarray], num_tokens: int, group_of: np.ndarray) -> dict[str, float]:
    abs_sums = np.array([np.abs(advantages).sum(dtype=np.float64) for advantages in filled])
    num_live_groups = len(np.unique(group_of[abs_sums > 0]))
    return {
        "advantage/abs_mean": float(abs_sums.sum()) / max(num_tokens, 1),
        "advantage/zero_groups_frac": 1.0 - num_live_groups / len(np.unique(group_of)),
    }
