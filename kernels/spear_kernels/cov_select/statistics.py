"""Number, maximum and mean of masked columns over all ranks, the same bits for every order and split of the rows.

Floating-point sums depend on the order of their terms, and one unit in the last place of a mean can move a token over a
covariance bound. Here each value is measured from the column's maximum in units of 2**-60 of its range, as two integers
of 30 bits, and integers add exactly. With R = max - min, each value is off by at most R * 2**-61, below float64's own
rounding of R, and a constant column has exactly its own value as its mean. 2**32 tokens do not overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from spear_kernels.ranks import all_max, all_sum

_LIMB_BITS = 30


class Statistics(NamedTuple):
    """What all ranks know about C columns; NaN where a column held a value that is not finite, or none."""

    count: torch.Tensor  # int64, 0-d: rows with mask True
    maximum: torch.Tensor  # float64 [C]
    mean: torch.Tensor  # float64 [C]


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2.0**exponent, float64, exact on every device, for int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _ends(column: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Maximum and negated minimum over the rows with mask True, 0-d each; -inf without rows."""
    if len(column) == 0:
        return [torch.full((), -torch.inf, dtype=torch.float64, device=column.device)] * 2
    top = torch.where(mask, column, -torch.inf).amax()
    bottom = torch.where(mask, column, torch.inf).amin()
    # all_max must not meet NaN: libraries differ in what they make of it.
    return [end.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) for end in (top, -bottom)]


def _limb_sums(column: torch.Tensor, mask: torch.Tensor, top: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """Sums of the upper and lower integer of (column - top) * scale, int64 0-d each."""
    scaled = torch.where(mask, (column.double() - top) * scale, 0)
    upper = scaled.round()
    lower = scaled.sub_(upper).mul_(1 << _LIMB_BITS).round_()
    return [upper.sum(dtype=torch.int64), lower.sum(dtype=torch.int64)]


def column_statistics(columns: Sequence[torch.Tensor], mask: torch.Tensor, group: str | None) -> Statistics:
    """Statistics of float `columns`, C tensors [N], over the rows of all ranks with bool `mask` [N] True."""
    ends = all_max(torch.stack([end for column in columns for end in _ends(column, mask)]), group).view(-1, 2)
    span = ends.sum(1)  # [C]
    usable = span.isfinite()
    # Below 2**-900 the scale would overflow; so small a range only loses precision.
    exponent = torch.frexp(torch.where(usable, span, 1)).exponent.long().clamp(min=-900)
    scale = _power_of_two(_LIMB_BITS - exponent)
    top = ends[:, 0]
    sums = [mask.sum()]
    for number, column in enumerate(columns):
        sums += _limb_sums(column, mask, top[number], scale[number])
    total = all_sum(torch.stack(sums), group)
    limbs = total[1:].view(-1, 2).double()
    offset = (limbs[:, 0] + limbs[:, 1] * 2.0**-_LIMB_BITS) / scale / total[0].clamp(min=1)
    return Statistics(total[0], torch.where(usable, top, torch.nan), torch.where(usable, top + offset, torch.nan))
