"""The definition of recalibration and its dual filter, row by row in Python numbers."""

from __future__ import annotations

import statistics

import torch


def recalibrated_advantages_reference(
    rewards: torch.Tensor,
    baseline_means: torch.Tensor,
    baseline_stds: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
) -> tuple[list[float], list[bool]]:
    """A~ = (R - P50 of the means) / (P50 of the stds + 1e-6), and whether A > 0 and A~ > 0, for each row."""
    centre = statistics.median(baseline_means.tolist())
    spread = 0.0 if baseline_stds is None else statistics.median(baseline_stds.tolist())
    renewed = [(reward - centre) / (spread + 1e-6 if spread else 1.0) for reward in rewards.tolist()]
    stored = renewed if advantages is None else advantages.tolist()
    return renewed, [new > 0 and old > 0 for new, old in zip(renewed, stored, strict=True)]
