"""The definition of GiGPO step advantages, step by step in Python numbers."""

from __future__ import annotations

import statistics

import torch


def step_advantages_reference(returns: torch.Tensor, anchor_ids: torch.Tensor, std_norm: bool = False) -> torch.Tensor:
    """(return - mean) / (std + 1e-6) or return - mean over the steps of one anchor, float64 [S]; 0 without others."""
    pairs = list(zip(returns.tolist(), anchor_ids.tolist(), strict=True))
    advantages = []
    for value, anchor in pairs:
        members = [other for other, other_anchor in pairs if other_anchor == anchor]
        if anchor < 0 or len(members) == 1:
            advantages.append(0.0)
            continue
        centred = value - statistics.fmean(members)
        advantages.append(centred / (statistics.stdev(members) + 1e-6) if std_norm else centred)
    return torch.tensor(advantages, dtype=torch.float64)
