"""`group_advantages`: rewards less the mean of their group, by one sort and O(R) sums; no host sync."""

from __future__ import annotations

import torch

from spear_kernels.checks import compute_dtype, require_shape
from spear_kernels.segment_reduce import STD_EPSILON, segment_index, segment_stats


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, std_norm: bool = False) -> torch.Tensor:
    """A_i = R_i - mean_G R, with `std_norm` divided by (std_G R + 1e-6); [R], float64 if rewards are, else float32.

    `rewards` [R]; `group_ids` int64 [R], any values, in any order. The standard deviation is the sample one (n - 1), as
    in verl. A group of one has mean 0 and std 1; equal rewards give exactly 0. The arithmetic is float64.
    Source: GRPO (arXiv 2402.03300); without std, Dr.GRPO (arXiv 2503.20783).

    Raises:
        ValueError: the two differ in length.
    """
    require_shape("group_ids", group_ids, tuple(rewards.shape))
    index = segment_index(group_ids)
    stats = segment_stats(rewards, index)
    alone = stats.count.index_select(0, index) == 1
    advantages = torch.where(alone, rewards.double(), stats.deviation)
    if std_norm:
        std = torch.where(alone, 1.0, stats.std.index_select(0, index))
        advantages = advantages / (std + STD_EPSILON)
    return advantages.to(compute_dtype(rewards))
