"""A digest of a weight tensor: equal bits give equal digests, on any device and in any order of execution."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_PERIOD = 1 << 20
"""Words after which the keys repeat, times another factor. Keys and words in work take 24 MiB."""
_CPU_BLOCK = 1 << 15
"""Words worked on at once on the CPU, so that what is between two operations stays in its cache."""
_FACTORS = 1 << 62
"""Where the factors begin in the sequence whose beginning is the keys; the one before is for an incomplete word."""
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


class Digests:
    """Digests of named tensors that are read from the device together, at the end.

    Example: `digests = Digests(); digests.add("norm", tensor); digests.result()` gives `{"norm": 1234}`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Digest the values that the tensor (any shape and strides) has now; the tensor is not kept."""
        self._sums[name] = _weighted_sum(tensor), _size_term(tensor)

    def result(self) -> dict[str, int]:
        """Return the 64-bit digests by name; waits for the devices."""
        by_device: dict[torch.device, list[str]] = {}
        for name, (total, _) in self._sums.items():
            by_device.setdefault(total.device, []).append(name)
        digests: dict[str, int] = {}
        for names in by_device.values():
            totals = torch.stack([self._sums[name][0] for name in names]).tolist()
            digests.update(
                {name: (total + self._sums[name][1]) & _MASK for name, total in zip(names, totals, strict=True)}
            )
        return {name: digests[name] for name in self._sums}


def digest(tensor: Tensor) -> int:
    """Return a 64-bit digest of the values, their order and the element size of `tensor`; shape does not count.

    The sum over 8-byte words w_i of (w_i ^ w_i >> 32) * key_i modulo 2^64, with odd pseudo-random keys, so that no
    order of summation matters. A change of any one word changes it for certain, any other change but for one case in
    billions; it guards against mistakes, not against an adversary.
    """
    return (int(_weighted_sum(tensor)) + _size_term(tensor)) & _MASK


@torch.no_grad()
def _weighted_sum(tensor: Tensor) -> Tensor:
    """The sum of `digest`, an int64 scalar on the tensor's device."""
    body, tail = _words(tensor)
    block = min(_PERIOD, _CPU_BLOCK) if body.device.type == "cpu" else _PERIOD
    keys = _keys(body.device)
    total = keys.new_zeros(())
    for start in range(0, len(body), _PERIOD):
        factor = _signed(_mix(_FACTORS + start // _PERIOD) | 1)
        for first in range(start, min(start + _PERIOD, len(body)), block):
            words = body[first : min(first + block, start + _PERIOD)]
            total += _folded(words).mul_(keys[first - start : first - start + len(words)]).sum() * factor
    if tail is not None:
        total += _folded(tail)[0] * _signed(_mix(_FACTORS - 1) | 1)
    return total


def _words(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bytes of a tensor as int64 words, and the rest that fills none as one word, or None."""
    flat = tensor.detach().contiguous().reshape(-1)
    per_word = 8 // flat.element_size()
    whole = flat.numel() // per_word * per_word
    body = flat[:whole]
    if whole and (body.data_ptr() % 8 or body.storage_offset() % per_word):
        body = body.clone()
    tail = None
    if whole < flat.numel():
        tail = flat.new_zeros(per_word)
        tail[: flat.numel() - whole] = flat[whole:]
    return body.view(torch.int64) if whole else body.new_empty(
        0, dtype=torch.int64
    ), None if tail is None else tail.view(torch.int64)


def _folded(words: Tensor) -> Tensor:
    """w ^ (w >> 32) without sign: a bijection after which a difference of the upper halves is one of the lower too."""
    return (words >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(words)


@lru_cache(maxsize=8)
def _keys(device: torch.device) -> Tensor:
    """Odd pseudo-random int64 [_PERIOD]: SplitMix64 of the index."""
    with torch.inference_mode(False):
        keys = torch.arange(1, _PERIOD + 1, device=device) * _signed(_GOLDEN)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
        return keys | 1


def _mix(value: int) -> int:
    """SplitMix64 of one integer."""
    value = (value + 1) * _GOLDEN & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _size_term(tensor: Tensor) -> int:
    return _mix(tensor.numel() * tensor.element_size()) + tensor.element_size()


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
