"""The definition of per-sequence sums, ranks and statistics: compare every row with every other."""

from __future__ import annotations

import torch

from spear_kernels.segment_reduce.stats import SegmentStats


def segment_sum_reference(values: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """For each row [N] the sum of `values` over the rows with its sequence id."""
    same = seq_ids[:, None] == seq_ids[None, :]
    return (same.to(values.dtype) * values[None, :]).sum(1)


def segment_rank_reference(seq_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For each row [N] the number of earlier rows with its sequence id and mask True, int64."""
    same = seq_ids[:, None] == seq_ids[None, :]
    earlier = torch.ones_like(same).tril(-1)
    return (same & earlier & mask[None, :]).sum(1)


def segment_stats_reference(values: torch.Tensor, index: torch.Tensor) -> SegmentStats:
    """Size, mean, sample standard deviation by label and deviation by row, float64, from the values of each label."""
    values = values.double()
    count = torch.zeros(len(index), dtype=torch.int64)
    mean, std, deviation = (torch.zeros(len(index), dtype=torch.float64) for _ in range(3))
    for label in set(index.tolist()):
        members = values[index == label]
        count[label], mean[label] = len(members), members.mean()
        std[label] = members.std() if len(members) > 1 else 0.0
        deviation[index == label] = members - members.mean()
    return SegmentStats(count, mean, std, deviation)
