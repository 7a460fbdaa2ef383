"""GiGPO: the advantage of a step over the other steps taken from the same state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .segments import STD_EPSILON, segment_deviations


def discounted_returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Return the return-to-go of each step of one trajectory, r_t + gamma * r_{t+1} + ..., float64 [S]."""
    returns = np.zeros(len(rewards), dtype=np.float64)
    running = 0.0
    for step in range(len(rewards) - 1, -1, -1):
        running = float(rewards[step]) + gamma * running
        returns[step] = running
    return returns


def step_groups(group_ids: Sequence[int], anchors: Sequence[str | None]) -> np.ndarray:
    """Return a label per step, int64 [S]: equal for equal (group, anchor), -1 for a step without an anchor."""
    labels: dict[tuple[int, str], int] = {}
    return np.array(
        [
            -1 if anchor is None else labels.setdefault((group, anchor), len(labels))
            for group, anchor in zip(group_ids, anchors, strict=True)
        ],
        dtype=np.int64,
    )


def step_advantages(returns: np.ndarray, labels: np.ndarray, std_norm: bool) -> np.ndarray:
    """Return A_step of each step, float64 [S]: its return minus the mean of its anchor group.

    `returns` float [S]; `labels` int [S] from `step_groups`. With `std_norm` divided by the group's sample standard
    deviation + 1e-6. A step alone in its group, or without an anchor, gets 0. Source: GiGPO (arXiv 2505.10978).
    """
    groups = segment_deviations(returns, labels)
    centred = np.where(labels < 0, 0.0, groups.deviation)
    if not std_norm:
        return centred
    return centred / (groups.std + STD_EPSILON)


def mean_group_size(labels: np.ndarray) -> float:
    """Return the mean number of steps of an anchor group; `labels` int [S] with at least one label >= 0."""
    anchored = labels[labels >= 0]
    return len(anchored) / len(np.unique(anchored))
