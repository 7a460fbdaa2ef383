"""Which entries of an index occur several times, laid out so that their gradients add up without scattering."""

from __future__ import annotations

import numpy as np
import torch

Repeats = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Pairs (rows int64 [P], places int64 [P, K]), one for each K: row `rows[p]` is read at the K places `places[p]`."""


def find_repeats(index: np.ndarray, device: torch.device | str) -> Repeats:
    """Return the rows that occur more than once in `index` (integers [N]), on `device`; negative entries are skipped.

    Example: [4, 7, 4, 5, 7, 9, 9] gives ((tensor([4, 7, 9]), tensor([[0, 2], [1, 4], [5, 6]])),).
    """
    order = np.argsort(index, kind="stable")
    rows, first, count = np.unique(index[order], return_index=True, return_counts=True)
    pairs = []
    for times in np.unique(count[(rows >= 0) & (count > 1)]):
        chosen = np.flatnonzero((rows >= 0) & (count == times))
        places = order[first[chosen, None] + np.arange(times)]
        pairs.append(tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in (rows[chosen], places)))
    return tuple(pairs)
