"""The baseline FIFO D_R: reward mean and spread of recent groups, whose medians recalibrate replayed rewards."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from spear_kernels.recalibrate import median
from spear_kernels.segment_reduce import segment_stats

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
        return float(median(torch.from_numpy(values)))


def group_statistics(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and sample standard deviation of `reward` over the usable trajectories of each group, float64 [P].

    Groups without a usable trajectory are left out. A group of one has its reward as mean and, as in the advantages, a
    standard deviation of 1.
    """
    usable = [[trajectory for trajectory in group.trajectories if trajectory.status.usable] for group in groups]
    members = [trajectories for trajectories in usable if trajectories]
    rewards = [trajectory.reward for trajectories in members for trajectory in trajectories]
    group_of = np.repeat(np.arange(len(members)), [len(trajectories) for trajectories in members])
    stats = segment_stats(torch.tensor(rewards, dtype=torch.float64), torch.from_numpy(group_of))
    stds = torch.where(stats.count == 1, 1.0, stats.std)
    return stats.mean[: len(members)].numpy(), stds[: len(members)].numpy()
