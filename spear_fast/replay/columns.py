"""A one-dimensional array that grows by doubling: the storage under the replay buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike


class Column:
    """Values of one type, appended in blocks at amortised constant cost per value."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._array = np.empty(0, dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """The values as a view; the next `extend` or `keep` may invalidate it."""
        return self._array[: self._size]

    @property
    def num_bytes(self) -> int:
        """Bytes of what is stored; growth may have reserved up to twice as many."""
        return self.values.nbytes

    def extend(self, block: np.ndarray) -> None:
        """Append a block, cast to the column's type."""
        size = self._size + len(block)
        if size > len(self._array):
            grown = np.empty(max(size, 2 * len(self._array)), dtype=self._array.dtype)
            grown[: self._size] = self.values
            self._array = grown
        self._array[self._size : size] = block
        self._size = size

    def keep(self, mask: np.ndarray) -> None:
        """Drop the values where `mask`, bool [size], is False, and free the spare capacity."""
        self._array = self.values[mask]
        self._size = len(self._array)
