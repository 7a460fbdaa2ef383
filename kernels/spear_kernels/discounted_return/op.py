"""`discounted_returns`: a scan by doubling over every trajectory at once, O(S log S); no host sync."""

from __future__ import annotations

import torch

from spear_kernels.checks import compute_dtype, host_may_wait, require_shape


def discounted_returns(
    rewards: torch.Tensor, traj_ids: torch.Tensor, gamma: float, *, max_steps: int | None = None
) -> torch.Tensor:
    """r_t + gamma * r_{t+1} + ... to the end of the trajectory, [S], float64 for float64 rewards, else float32.

    `rewards` [S], the steps of a trajectory in order; `traj_ids` int64 [S], any values, trajectories may interleave.
    After k rounds each entry holds 2^k steps, so nothing is divided by a power of `gamma` and every term sees about
    log2(length) roundings. Equal rewards to the end give bitwise equal returns wherever they lie. `max_steps`, the
    length of the longest trajectory, saves rounds on a device, where the host does not look; on the CPU the rounds
    end by themselves. The arithmetic is float64.

    Raises:
        ValueError: lengths differ, or `gamma` lies outside 0 to 1.
    """
    require_shape("traj_ids", traj_ids, tuple(rewards.shape))
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma} must lie between 0 and 1")
    order = torch.argsort(traj_ids, stable=True)
    returns, owner = rewards.index_select(0, order).double(), traj_ids.index_select(0, order)
    reach, longest = 1, len(rewards) if max_steps is None else min(max_steps, len(rewards))
    while reach < longest:
        same = owner[reach:] == owner[:-reach]
        if host_may_wait(same) and not same.any():
            break
        # gamma**reach, not a running square, whose error doubles with each round.
        returns[:-reach] += torch.where(same, gamma**reach * returns[reach:], 0)
        reach *= 2
    return torch.empty_like(returns).scatter_(0, order, returns).to(compute_dtype(rewards))
