"""Recalibration of stored advantages against the baseline D_R, and the dual filter; one sort of D_R, no host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spear_kernels.checks import compute_dtype, require_shape
from spear_kernels.segment_reduce import STD_EPSILON


class Recalibrated(NamedTuple):
    """New advantages, and which rows the dual filter A > 0 and A~ > 0 keeps."""

    advantages: torch.Tensor  # [R]
    keep: torch.Tensor  # bool [R]


def median(values: torch.Tensor) -> torch.Tensor:
    """P50 of `values` [P], 0-d: the middle one, or the mean of the two in the middle, as numpy; NaN if any is NaN.

    Raises:
        ValueError: `values` is empty.
    """
    if len(values) == 0:
        raise ValueError("values of shape (0,) have no median; push the statistics of a step first")
    ordered = values.sort().values
    middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return torch.where(ordered[-1].isnan(), ordered[-1], middle)  # NaN sorts last.


def recalibrate(
    rewards: torch.Tensor, median_mean: torch.Tensor | float, median_std: torch.Tensor | float | None = None
) -> torch.Tensor:
    """A~ = R - median_mean, [R], divided by (median_std + 1e-6) if that is given and not 0.

    A median std of 0 (most recent groups all won or all lost) says nothing of the scale, and dividing by 1e-6 would
    give advantages of 1e6. Medians are numbers or 0-d. Source: SPEAR (arXiv 2509.22601), advantage recalibration.
    """
    centred = rewards - median_mean
    if median_std is None:
        return centred
    if not isinstance(median_std, torch.Tensor):
        # Filled on the device: copying a number there would make the host wait.
        median_std = torch.full((), median_std, dtype=centred.dtype, device=centred.device)
    return centred / torch.where(median_std == 0, 1, median_std + STD_EPSILON)


def recalibrated_advantages(
    rewards: torch.Tensor,
    baseline_means: torch.Tensor,
    baseline_stds: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
) -> Recalibrated:
    """A~ = R - P50(D_R) of stored rows, with `baseline_stds` divided by their P50 + 1e-6 unless that is 0.

    `rewards` [R]; `baseline_means`, `baseline_stds` [P], mean and standard deviation of the rewards of recent groups;
    `advantages` [R], those at the time of storage: without them `keep` is A~ > 0 alone. Returns float64 if rewards or
    means are float64, else float32. Give both in one dtype: float32 0.1 lies above float64 0.1 and would be kept.
    Source: SPEAR (arXiv 2509.22601), advantage recalibration and dual filter.

    Raises:
        ValueError: lengths differ, or the baseline is empty.
    """
    require_shape("advantages", advantages, tuple(rewards.shape))
    require_shape("baseline_stds", baseline_stds, tuple(baseline_means.shape))
    dtype = compute_dtype(rewards, baseline_means)
    spread = None if baseline_stds is None else median(baseline_stds.to(dtype))
    renewed = recalibrate(rewards.to(dtype), median(baseline_means.to(dtype)), spread)
    return Recalibrated(renewed, _dual_filter(renewed, advantages))


def scaled_advantages(advantages: torch.Tensor, weight: float) -> Recalibrated:
    """A~ = A * weight of any shape, in the dtype of `advantages`: decay in place of a new estimate, same dual filter.

    Raises:
        ValueError: `weight` is negative, which would turn successes into failures.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must not be negative; use one between 0 and 1")
    scaled = advantages * weight
    return Recalibrated(scaled, _dual_filter(scaled, advantages))


def _dual_filter(renewed: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
    return renewed > 0 if stored is None else (renewed > 0) & (stored > 0)
