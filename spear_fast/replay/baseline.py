"""The baseline FIFO D_R: reward mean and spread of recent groups, whose medians recalibrate replayed rewards."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..types import Group


class BaselineQueue:
    """Mean and standard deviation of the rewards of the last `capacity` groups, oldest first.

    Raises ConfigError for a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"baseline_size={capacity} must be at least 1 group")
        self._capacity = capacity
        self._means = np.empty(0, dtype=np.float64)
        self._stds = np.empty(0, dtype=np.float64)

    def __len__(self) -> int:
        return len(self._means)

    def push(self, means: np.ndarray, stds: np.ndarray) -> None:
        """Append one mean and one standard deviation per group, float [P] each; the oldest beyond capacity leave."""
        if len(means) != len(stds):
            raise ValueError(f"{len(means)} means but {len(stds)} standard deviations; pass one of each per group")
        self._means = np.concatenate([self._means, means])[-self._capacity :]
        self._stds = np.concatenate([self._stds, stds])[-self._capacity :]

    def median_mean(self) -> float:
        """Return P50 of the group means. Raises ValueError while nothing was pushed."""
        return self._median(self._means)

    def median_std(self) -> float:
        """Return P50 of the group standard deviations. Raises ValueError while nothing was pushed."""
        return self._median(self._stds)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return {"means": float64 [P], "stds": float64 [P]}, oldest first."""
        return {"means": self._means.copy(), "stds": self._stds.copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore `state_dict`; if the capacity shrank, the newest stay. Raises CheckpointError if it does not fit."""
        if set(state) != {"means", "stds"} or state["means"].shape != state["stds"].shape or state["means"].ndim != 1:
            shapes = {key: value.shape for key, value in state.items()}
            raise CheckpointError(
                f"reward baseline {shapes} must hold 'means' and 'stds' of one length; resume from another checkpoint"
            )
        self._means = np.array(state["means"][-self._capacity :], dtype=np.float64)
        self._stds = np.array(state["stds"][-self._capacity :], dtype=np.float64)

    @staticmethod
    def _median(values: np.ndarray) -> float:
        if len(values) == 0:
            raise ValueError("the reward baseline is empty; push the statistics of a step first")
        return float(np.median(values))


def group_statistics(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and sample standard deviation of `reward` over the usable trajectories of each group, float64 [P].

    Groups without a usable trajectory are left out. A group of one has its reward as mean and, as in the advantages, a
    standard deviation of 1.
    """
    rewards_by_group = [
        np.array([trajectory.reward for trajectory in group.trajectories if trajectory.status.usable], dtype=np.float64)
        for group in groups
    ]
    statistics = [_mean_and_std(rewards) for rewards in rewards_by_group if len(rewards)]
    means, stds = np.array(statistics, dtype=np.float64).reshape(-1, 2).T
    return means, stds


def _mean_and_std(rewards: np.ndarray) -> tuple[float, float]:
    # Shifting by a member makes mean and std of equal rewards exact; with a plain mean, a reward equal to the baseline
    # could lie an ulp above it and pass for a positive advantage.
    shifted = rewards - rewards[0]
    std = float(shifted.std(ddof=1)) if len(rewards) > 1 else 1.0
    return float(rewards[0] + shifted.mean()), std
