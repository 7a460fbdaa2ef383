"""The definition of per-sequence sums and ranks: compare every row with every other."""

from __future__ import annotations

import torch


def segment_sum_reference(values: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """For each row [N] the sum of `values` over the rows with its sequence id."""
    same = seq_ids[:, None] == seq_ids[None, :]
    return (same.to(values.dtype) * values[None, :]).sum(1)


def segment_rank_reference(seq_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For each row [N] the number of earlier rows with its sequence id and mask True, int64."""
    same = seq_ids[:, None] == seq_ids[None, :]
    earlier = torch.ones_like(same).tril(-1)
    return (same & earlier & mask[None, :]).sum(1)
