"""Intervals of a study: of the tasks solved, and of a difference between runs of equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return the mean of second - first over equal seeds and its 95 % t interval; None for a single seed.

    Raises ValueError if the numbers of seeds differ or are beyond the table of quantiles.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    centre, freedom = mean(differences), len(differences) - 1
    if not freedom:
        return centre, None
    if freedom > len(T_QUANTILES):
        raise ValueError(f"{freedom + 1} seeds are more than the {len(T_QUANTILES) + 1} that the table serves")
    half_width = T_QUANTILES[freedom - 1] * stdev(differences) / sqrt(len(differences))
    return centre, (centre - half_width, centre + half_width)
