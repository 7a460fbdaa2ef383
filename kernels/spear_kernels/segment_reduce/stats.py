"""Size, mean, standard deviation and deviations of labelled segments; O(N), no host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spear_kernels.checks import require_shape
from spear_kernels.segment_reduce.op import segment_sum

STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, as in verl."""


class SegmentStats(NamedTuple):
    """Statistics by label, entries of unused labels 0, and each row's distance from the mean of its segment, all [N].

    Example: values [1, 3, 5] with labels [0, 0, 1] give count [2, 1, 0], mean [2, 5, 0], std [1.41, 0, 0] and
    deviation [-1, 1, 0].
    """

    count: torch.Tensor  # int64, by label
    mean: torch.Tensor  # float64, by label
    std: torch.Tensor  # float64, by label; divides by count - 1; 0 in a segment of one
    deviation: torch.Tensor  # float64, by row


def segment_stats(values: torch.Tensor, index: torch.Tensor) -> SegmentStats:
    """Statistics of `values` [N] in the segments of labels `index` int64 [N], as `segment_index` makes them.

    Equal values have exactly themselves as mean, deviation 0 and std 0. Computed in float64 whatever the dtype.

    Raises:
        ValueError: the two differ in length.
    """
    require_shape("index", index, tuple(values.shape))
    values = values.double()
    rows = torch.arange(len(index), device=index.device)
    first = torch.full_like(index, len(index) - 1).scatter_reduce_(0, index, rows, "amin")
    count = segment_sum(torch.ones_like(index), index)
    # Subtracting a member first makes the deviations of equal values exactly 0. A plain mean is off by an ulp
    # (0.1 * 8 / 8 != 0.1), and that ulp would pass for a positive advantage.
    member = values.index_select(0, first)
    shifted = values - member.index_select(0, index)
    shifted_mean = segment_sum(shifted, index) / count.clamp(min=1)
    deviation = shifted - shifted_mean.index_select(0, index)
    variance = segment_sum(deviation**2, index) / (count - 1).clamp(min=1)
    return SegmentStats(count, torch.where(count > 0, member + shifted_mean, 0), variance.sqrt(), deviation)
