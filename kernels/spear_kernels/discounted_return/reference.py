"""The definition of discounted returns: the recurrence, backwards over the steps."""

from __future__ import annotations

import torch


def discounted_returns_reference(rewards: torch.Tensor, traj_ids: torch.Tensor, gamma: float) -> torch.Tensor:
    """R_t = r_t + gamma * R_{t+1} within a trajectory, float64 [S]."""
    running: dict[int, float] = {}
    returns = [0.0] * len(rewards)
    for step in reversed(range(len(rewards))):
        trajectory = int(traj_ids[step])
        running[trajectory] = float(rewards[step]) + gamma * running.get(trajectory, 0.0)
        returns[step] = running[trajectory]
    return torch.tensor(returns, dtype=torch.float64)
