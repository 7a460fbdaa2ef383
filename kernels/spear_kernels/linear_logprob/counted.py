"""Products over rows whose number only the device knows: Triton products that stop at a count in device memory.

They run at a lower rate than the vendor's, and the host need not wait to learn how many rows there are.
"""

from __future__ import annotations

import torch

from spear_kernels.linear_logprob.head import Head
from spear_kernels.linear_logprob.plan import order_and_count
from spear_kernels.linear_logprob.sums import GradientSums


def can_count(head: Head, hidden: torch.Tensor) -> bool:
    """Whether the kernels take these types: all of one, and logits whose gradient has it too."""
    return hidden.dtype == head.weight.dtype == head.gradient_dtype and head.width > 0


def counted_logits(head: Head, x: torch.Tensor, count: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + bias in the first `count` (int32 [1]) rows of `buffer`; returns its rows [n, V] for x [n, H]."""
    from spear_kernels.linear_logprob.launch import live_rows_product

    z = buffer[: len(x)]
    unused = torch.empty(len(x), dtype=torch.int64, device=x.device)
    weight, bias = head.weight.t(), head.bias
    return live_rows_product(
        x, weight, unused, count, z, bias=bias, gather=False, scatter=False, overwrite_padding=True
    )


def add_counted(sums: GradientSums, rows: slice, x: torch.Tensor, dz: torch.Tensor, live: torch.Tensor) -> None:
    """`GradientSums.add` of the rows where live bool [n] is True; dz [n, V] holds zeros in the others."""
    from spear_kernels.linear_logprob.launch import live_rows_outer, live_rows_product

    order, count = order_and_count(live)
    width = sums.head.width
    if sums.hidden is not None:
        live_rows_product(dz, sums.head.weight, order, count, sums.hidden[rows])
    if sums.weight is not None:
        live_rows_outer(dz, x, order, count, sums.weight[:width])
    if sums.bias is not None:
        sums.bias[:width].add_(dz.sum(0, dtype=sums.bias.dtype))
