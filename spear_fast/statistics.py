"""Confidence interval of a success rate."""

from __future__ import annotations

from math import sqrt


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a rate seen as `successes` out of `n` independent trials.

    `z` is the normal quantile; 1.96 gives 95 %. No trials give (0, 1). Source: Wilson (1927), JASA 22(158), 209-212:
    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must lie between 0 and n={n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half_width = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    # The interval always holds the rate; rounding must not push a bound past it, nor past 0 or 1.
    return max(0.0, min(rate, centre - half_width)), min(1.0, max(rate, centre + half_width))
