"""Mean, standard deviation and size of labelled segments, without a loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, as in verl."""


@dataclass(frozen=True)
class SegmentDeviations:
    """Each value's distance from its segment's mean, with the segment's spread and size, all [S].

    Example: values [1, 3, 5] in segments [0, 0, 7] give deviation [-1, 1, 0], std [1.41, 1.41, 0], size [2, 2, 1].
    """

    deviation: np.ndarray  # float64 [S]
    std: np.ndarray  # float64 [S], sample standard deviation (n - 1); 0 in a segment of one
    size: np.ndarray  # int64 [S]


def segment_deviations(values: np.ndarray, segments: np.ndarray) -> SegmentDeviations:
    """Return the deviations of `values` float [S] within equal labels of `segments` [S].

    The spread divides by n - 1, which is what `torch.std` does in verl and verl-agent.
    """
    _, first, label, counts = np.unique(segments, return_index=True, return_inverse=True, return_counts=True)
    # Subtracting a member first makes the deviations of equal values exactly 0. A plain mean is off by an ulp
    # (0.1 * 8 / 8 != 0.1), and that ulp would pass for a positive advantage.
    shifted = values.astype(np.float64) - values[first].astype(np.float64)[label]
    deviation = shifted - (np.bincount(label, weights=shifted) / counts)[label]
    variance = np.bincount(label, weights=deviation**2) / np.maximum(counts - 1, 1)
    return SegmentDeviations(deviation, np.sqrt(variance)[label], counts[label])
