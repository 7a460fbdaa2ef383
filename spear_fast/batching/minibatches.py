"""Rows to mini-batches, one per optimizer step."""

from __future__ import annotations

import numpy as np


def split(num_rows: int, size: int | None, seed: int) -> list[list[int]]:
    """Return the row indices of each mini-batch: a seeded shuffle cut into ceil(num_rows / size) parts.

    `size` is the largest number of rows in a part; None puts all rows into one. Parts differ by at most one row, since
    a small remainder would take a full optimizer step on a noisy gradient. Indices ascend within a part.
    Raises ValueError for a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"mini_batch_size={size} must be at least 1 row, or None for a single mini-batch")
    if num_rows == 0:
        return []
    num_parts = 1 if size is None else -(-num_rows // size)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    return [np.sort(part).tolist() for part in np.array_split(order, num_parts)]
