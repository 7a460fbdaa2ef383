"""Fills the per-token advantages of a step's trajectories with the chosen estimator."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import numpy as np
import torch

from spear_kernels.discounted_return import discounted_returns
from spear_kernels.group_advantage import group_advantages
from spear_kernels.spans import span_index, spread
from spear_kernels.step_advantage import step_advantages

from ..types import Group, Trajectory
from .step_group import mean_group_size, step_groups


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
    rewards = torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float64)
    episode = group_advantages(rewards, torch.from_numpy(group_of), std_norm=std_norm)
    spans = [(0, len(trajectory.tokens)) for trajectory in trajectories]
    owner, values, stats = np.arange(len(trajectories)), episode, {}
    if estimator == "gigpo":
        spans = [(turn.start, turn.end) for trajectory in trajectories for turn in trajectory.turns]
        owner = np.repeat(np.arange(len(trajectories)), [len(trajectory.turns) for trajectory in trajectories])
        steps, stats = _step_advantages(trajectories, group_of, owner, gamma, step_std_norm)
        values = episode[torch.from_numpy(owner)] + step_weight * steps
    filled = _on_action_tokens(trajectories, values, spans, owner)
    for trajectory, advantages in zip(trajectories, filled, strict=True):
        trajectory.advantages = advantages
    num_tokens = sum(trajectory.num_action_tokens for trajectory in trajectories)
    return {**_statistics(filled, num_tokens, group_of), **stats}


def _step_advantages(
    trajectories: list[Trajectory], group_of: np.ndarray, owner: np.ndarray, gamma: float, std_norm: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return A_step of all turns, float64 [S], and statistics; `owner` int [S] is the trajectory of each."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    labels = step_groups(group_of[owner].tolist(), [turn.anchor for turn in turns])
    rewards = torch.tensor([turn.reward for turn in turns], dtype=torch.float64)
    returns = discounted_returns(rewards, torch.from_numpy(owner), gamma)
    has_anchors = bool((labels >= 0).any())
    stats = {"advantage/anchor_group_size_mean": mean_group_size(labels)} if has_anchors else {}
    return step_advantages(returns, torch.from_numpy(labels), std_norm=std_norm), stats


def _on_action_tokens(
    trajectories: list[Trajectory], values: torch.Tensor, spans: list[tuple[int, int]], owner: np.ndarray
) -> list[np.ndarray]:
    """Return float32 [L] for each trajectory with the values [S] of its spans on their action tokens.

    Span s is tokens spans[s][0] to spans[s][1] - 1 of trajectory owner[s].
    """
    offsets = np.cumsum([0, *(len(trajectory.tokens) for trajectory in trajectories)])
    limits = torch.from_numpy(np.array(spans, dtype=np.int64).reshape(-1, 2) + offsets[owner][:, None])
    index = span_index(limits[:, 0], limits[:, 1], int(offsets[-1]))
    masks = chain.from_iterable(trajectory.action_mask for trajectory in trajectories)
    mask = torch.from_numpy(np.fromiter(masks, dtype=np.bool_, count=offsets[-1]))
    outside = mask & (index < 0)
    if outside.any():
        token = int(outside.long().argmax())
        place = int(np.searchsorted(offsets, token, side="right")) - 1
        raise ValueError(
            f"trajectory uid={trajectories[place].uid} has an action token at {token - offsets[place]} outside its "
            "turns; add a Turn for every sampled message"
        )
    return np.split(spread(values.float(), index, mask).numpy(), offsets[1:-1])


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
