"""A digest of a weight tensor: equal bits give equal digests, on any device and in any order of execution."""

from __future__ import annotations

import torch

_CHUNK = 1 << 24
"""Elements hashed at once, which bounds the extra memory to a few hundred MiB."""
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensor: torch.Tensor) -> int:
    """Return a 64-bit digest of the values, their order and the element size of `tensor`.

    The sum over elements of mix(bits, index), modulo 2^64, so that no order of summation matters. A change of any one
    element changes it; it guards against mistakes, not against an adversary.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    total = flat.new_zeros((), dtype=torch.int64)
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].to(torch.int64)
        index = torch.arange(start + 1, start + 1 + len(bits), device=flat.device)
        mixed = (bits ^ (bits << 21)) + index * _GOLDEN
        mixed ^= mixed >> 29
        mixed *= -4658895280553007687  # 0xBF58476D1CE4E5B9, of SplitMix64
        mixed ^= mixed >> 32
        total += mixed.sum()
    return (int(total) + flat.numel() * tensor.element_size()) & 0xFFFFFFFFFFFFFFFF
