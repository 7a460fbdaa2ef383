"""`step_advantages`: returns less the mean of their anchor group, by one sort and O(S) sums; no host sync."""

from __future__ import annotations

import torch

from spear_kernels.checks import compute_dtype, require_shape
from spear_kernels.segment_reduce import STD_EPSILON, segment_index, segment_stats


def step_advantages(returns: torch.Tensor, anchor_ids: torch.Tensor, *, std_norm: bool = False) -> torch.Tensor:
    """A_step = return - mean of the anchor group, [S], float64 for float64 returns, else float32.

    `returns` [S], from `discounted_returns`; `anchor_ids` int64 [S] name the steps of one prompt group that saw the
    same state, negative for a step without one. With `std_norm` divided by (sample standard deviation of the group +
    1e-6). A step alone in its group, or without an anchor, gets exactly 0, and so do equal returns. The arithmetic is
    float64. Source: GiGPO (arXiv 2505.10978).

    Raises:
        ValueError: the two differ in length.
    """
    require_shape("anchor_ids", anchor_ids, tuple(returns.shape))
    index = segment_index(anchor_ids)
    stats = segment_stats(returns, index)
    advantages = torch.where(anchor_ids < 0, 0, stats.deviation)
    if std_norm:
        advantages = advantages / (stats.std.index_select(0, index) + STD_EPSILON)
    return advantages.to(compute_dtype(returns))
