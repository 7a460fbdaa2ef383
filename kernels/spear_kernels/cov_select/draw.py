"""Counter-based random priorities: a hash of (seed, sequence id, position), the same wherever and whenever computed.

The hash is splitmix64's finaliser chained over the three keys, in int64 arithmetic that wraps modulo 2**64.
"""

from __future__ import annotations

import torch

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def signed_word(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    if -(1 << 63) <= value < 1 << 63:
        return value  # torch.compile's symbolic integers have no bits to mask
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 >> copies the sign bit; splitmix64 shifts zeros in.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 of the int64 words x, in a new tensor of their shape."""
    x = x + signed_word(_INCREMENT)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(signed_word(_MULTIPLIERS[0]))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(signed_word(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def priorities(seed: int, seq_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """63-bit priorities, int64 [N] >= 0, for sequence ids and positions int64 [N]; independent of the row order."""
    start = _mix(positions.new_full((), signed_word(seed)))
    return _shift_right(_mix(_mix(start ^ seq_ids) ^ positions), 1)
