"""Counter-based random priorities: a hash of (seed, sequence id, position), the same wherever and whenever computed.

The hash is splitmix64's finaliser chained over the three keys, in int64 arithmetic that wraps modulo 2**64.
"""

from __future__ import annotations

import torch

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 >> copies the sign bit; splitmix64 shifts zeros in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 of the int64 words x [N]."""
    x = x + _signed(_INCREMENT)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def priorities(seed: int, seq_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """63-bit priorities, int64 [N] >= 0, for sequence ids and positions int64 [N]; independent of the row order."""
    start = torch.full_like(positions, _signed(seed))
    return _shift_right(_mix(_mix(_mix(start) ^ seq_ids) ^ positions), 1)
