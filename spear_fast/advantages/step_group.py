"""GiGPO's step groups: the steps of a prompt that were taken from the same state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def step_groups(group_ids: Sequence[int], anchors: Sequence[str | None]) -> np.ndarray:
    """Return a label per step, int64 [S]: equal for equal (group, anchor), -1 for a step without an anchor."""
    labels: dict[tuple[int, str], int] = {}
    return np.array(
        [
            -1 if anchor is None else labels.setdefault((group, anchor), len(labels))
            for group, anchor in zip(group_ids, anchors, strict=True)
        ],
        dtype=np.int64,
    )


def mean_group_size(labels: np.ndarray) -> float:
    """Return the mean number of steps of an anchor group; `labels` int [S] with at least one label >= 0."""
    anchored = labels[labels >= 0]
    return len(anchored) / len(np.unique(anchored))
