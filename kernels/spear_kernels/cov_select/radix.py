"""The k-th smallest key over all ranks, from histograms of a few bits of the key at a time, most significant first.

Each round all-reduces one histogram of fixed size and keeps the rows in the bin that holds the k-th key. The number of
rounds and the sizes do not depend on the data, so nothing waits for the device and no row leaves its rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spear_kernels.ranks import all_sum

_BITS = 13
"""Five rounds of 64 KiB: on CPU as fast as four of 512 KiB for 1 M rows, and faster for 10 k."""
_DIGITS = ((52, 12), (39, _BITS), (26, _BITS), (13, _BITS), (0, _BITS))  # shift, bits
_LARGEST = (1 << 63) - 1
_SIGN = -1 << 63


class Threshold(NamedTuple):
    """The k-th smallest key; with fewer than k rows the largest int64."""

    key: torch.Tensor  # int64, 0-d
    ties: torch.Tensor  # bool [N]: this rank's rows with that key
    remaining: torch.Tensor  # int64, 0-d: k less the number of rows with a smaller key


def ordered_key(values: torch.Tensor) -> torch.Tensor:
    """int64 keys that order as float64 `values` do, except that -0.0 comes before 0.0."""
    bits = values.view(torch.int64)
    return bits ^ ((bits >> 63) & _LARGEST)


def key_value(keys: torch.Tensor) -> torch.Tensor:
    """The float64 values whose `ordered_key` is `keys`."""
    return (keys ^ ((keys >> 63) & _LARGEST)).view(torch.float64)


def kth_smallest(keys: torch.Tensor, alive: torch.Tensor, k: torch.Tensor, group: str | None) -> Threshold:
    """The k-th smallest of the int64 keys [N] whose row is in bool `alive` [N]; k >= 1, int64 0-d, equal on all ranks.

    On CPU fresh memory costs more than the arithmetic, so all rounds write into the same three vectors.
    """
    threshold = torch.zeros_like(k)
    keys = keys ^ _SIGN  # orders as unsigned words
    weight, buffer = alive.long(), torch.empty_like(keys)
    for shift, bits in _DIGITS:
        digit = torch.bitwise_right_shift(keys, shift, out=buffer).bitwise_and_((1 << bits) - 1)
        counts = all_sum(k.new_zeros(1 << bits).scatter_add_(0, digit, weight), group)
        up_to = counts.cumsum(0)
        # A k beyond the number of rows runs past the last bin in every round.
        found = (up_to < k).sum().clamp(max=(1 << bits) - 1)
        k = k - (up_to - counts).gather(0, found.reshape(1))[0]
        weight.mul_(digit.eq_(found))
        threshold = threshold | (found << shift)
    return Threshold(threshold ^ _SIGN, weight.bool(), k)
