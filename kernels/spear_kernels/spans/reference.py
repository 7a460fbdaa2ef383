"""The definition of spans, row by row."""

from __future__ import annotations

import torch


def span_index_reference(starts: torch.Tensor, ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """For each row the span with start <= row < end, else -1; int64 [T]."""
    index = [-1] * num_rows
    for span, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        for row in range(start, end):
            index[row] = span
    return torch.tensor(index, dtype=torch.int64)


def spread_reference(values: torch.Tensor, index: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values[index[t]] where mask is True and the row lies in a span, else 0; [T]."""
    pairs = zip(index.tolist(), mask.tolist(), strict=True)
    return torch.tensor([values[span].item() if span >= 0 and on else 0 for span, on in pairs], dtype=values.dtype)
