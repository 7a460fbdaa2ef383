"""Which span (sequence, turn, message) a packed row lies in, and its value there; O(T), no host sync."""

from __future__ import annotations

import torch

from spear_kernels.checks import host_may_wait, require_shape


def span_index(starts: torch.Tensor, ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Number of the span that holds each row, int64 [T] with T = `num_rows`; -1 between spans.

    Span s is rows starts[s] to ends[s] - 1; int [S] each, ascending, without overlap; empty spans are allowed.
    Sequences are `span_index(cu_seqlens[:-1], cu_seqlens[1:], num_rows)`. Spans on a device are not checked, because
    reading them would make the host wait.

    Raises:
        ValueError: lengths differ, or (on the CPU) spans overlap, descend or leave the rows.
    """
    require_shape("ends", ends, tuple(starts.shape))
    if len(starts) == 0:
        return torch.full((num_rows,), -1, dtype=torch.int64, device=starts.device)
    starts, ends = starts.long(), ends.long()
    if host_may_wait(starts):
        _check_spans(starts, ends, num_rows)
    opened = torch.zeros(num_rows + 1, dtype=torch.int64, device=starts.device)
    last_opened = opened.index_add_(0, starts, torch.ones_like(starts)).cumsum(0)[:num_rows] - 1  # [T]
    rows = torch.arange(num_rows, device=starts.device)
    return torch.where((last_opened >= 0) & (rows < ends.index_select(0, last_opened.clamp(min=0))), last_opened, -1)


def _check_spans(starts: torch.Tensor, ends: torch.Tensor, num_rows: int) -> None:
    limits = torch.cat([starts[1:], starts.new_tensor([num_rows])])
    wrong = (starts < 0) | (ends < starts) | (ends > limits)
    if wrong.any():
        span = int(wrong.long().argmax())
        raise ValueError(
            f"starts[{span}]={int(starts[span])}, ends[{span}]={int(ends[span])} must lie within 0 and "
            f"{int(limits[span])}, the next start or num_rows; sort the spans and cut overlaps"
        )


def spread(values: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Value of each row's span, [T] in the dtype of `values` [S]; 0 where `index` int64 [T] is negative or mask False.

    Puts per-sequence or per-turn advantages on action tokens: `spread(advantages, span_index(...), action_mask)`.

    Raises:
        ValueError: index and mask bool [T] differ in length.
    """
    require_shape("mask", mask, tuple(index.shape))
    if len(values) == 0:
        return torch.zeros(index.shape, dtype=values.dtype, device=values.device)
    inside = index >= 0 if mask is None else (index >= 0) & mask
    return torch.where(inside, values.index_select(0, index.clamp(min=0)), 0)
