"""GRPO: the advantage of a trajectory over the others of its prompt."""

from __future__ import annotations

import numpy as np

from .segments import STD_EPSILON, segment_deviations


def group_advantages(rewards: np.ndarray, group_ids: np.ndarray, std_norm: bool) -> np.ndarray:
    """Return A_i = (R_i - mean_G R) / (std_G R + 1e-6), or R_i - mean_G R without `std_norm`; float64 [R].

    `rewards` float [R], `group_ids` int [R]. The standard deviation is the sample one (n - 1), as in verl. A group of
    one has mean 0 and std 1. Source: GRPO (arXiv 2402.03300); without std, Dr.GRPO (arXiv 2503.20783).
    """
    groups = segment_deviations(rewards, group_ids)
    alone = groups.size == 1
    centred = np.where(alone, rewards, groups.deviation)
    if not std_norm:
        return centred
    return centred / (np.where(alone, 1.0, groups.std) + STD_EPSILON)
