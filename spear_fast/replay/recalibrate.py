"""The advantage A~ of a stored trajectory at the time it is replayed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from spear_kernels.recalibrate import recalibrate, scaled_advantages

from ..types import Row

Mode = Literal["p50", "decay", "none"]


def recalibrate_by_median(rewards: np.ndarray, median_mean: float, median_std: float | None) -> np.ndarray:
    """Return A~ = R - P50(D_R), float64 [R], divided by (`median_std` + 1e-6) unless that is None.

    `rewards` float [R]; the medians are those of the baseline FIFO. A `median_std` of 0 divides nothing.
    """
    return recalibrate(torch.from_numpy(rewards), median_mean, median_std).numpy()


def with_constant_advantage(row: Row, advantage: float) -> Row:
    """Set the advantage of every action token of `row` to `advantage`; return the row."""
    row.advantages = np.where(row.action_mask, advantage, 0.0).astype(np.float32)
    return row


def with_scaled_advantages(row: Row, scale: float) -> Row:
    """Multiply the stored advantages of `row` by `scale` (A~ = A * w, no re-estimate); return the row."""
    row.advantages = scaled_advantages(torch.from_numpy(row.advantages), scale).advantages.numpy()
    return row
