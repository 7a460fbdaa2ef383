"""The advantage A~ of a stored trajectory at the time it is replayed."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..types import Row

Mode = Literal["p50", "decay", "none"]
STD_EPSILON = 1e-6


def recalibrate_by_median(rewards: np.ndarray, median_mean: float, median_std: float | None) -> np.ndarray:
    """Return A~ = R - P50(D_R), float64 [R], divided by (`median_std` + 1e-6) unless that is None.

    `rewards` float [R]; the medians are those of the baseline FIFO. A `median_std` of 0 (most recent groups all won or
    all lost) says nothing of the scale, and dividing by 1e-6 would give advantages of 1e6: then nothing is divided.
    Source: SPEAR (arXiv 2509.22601), advantage recalibration.
    """
    centred = rewards - median_mean
    return centred if not median_std else centred / (median_std + STD_EPSILON)


def with_constant_advantage(row: Row, advantage: float) -> Row:
    """Set the advantage of every action token of `row` to `advantage`; return the row."""
    row.advantages = np.where(row.action_mask, advantage, 0.0).astype(np.float32)
    return row


def with_scaled_advantages(row: Row, scale: float) -> Row:
    """Multiply the stored advantages of `row` by `scale` (A~ = A * w, no re-estimate); return the row."""
    row.advantages = (row.advantages * np.float32(scale)).astype(np.float32)
    return row
