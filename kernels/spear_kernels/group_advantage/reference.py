"""The definition of GRPO advantages, sample by sample in Python numbers."""

from __future__ import annotations

import statistics

import torch


def group_advantages_reference(rewards: torch.Tensor, group_ids: torch.Tensor, std_norm: bool = False) -> torch.Tensor:
    """(R - mean) / (std + 1e-6) or R - mean over the rewards of the same group, float64 [R]; mean 0, std 1 if alone."""
    pairs = list(zip(rewards.tolist(), group_ids.tolist(), strict=True))
    advantages = []
    for reward, group in pairs:
        members = [other for other, other_group in pairs if other_group == group]
        mean = statistics.fmean(members) if len(members) > 1 else 0.0
        std = statistics.stdev(members) if len(members) > 1 else 1.0
        advantages.append((reward - mean) / (std + 1e-6) if std_norm else reward - mean)
    return torch.tensor(advantages, dtype=torch.float64)
