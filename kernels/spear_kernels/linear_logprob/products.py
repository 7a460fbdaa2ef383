"""The three matrix products of a linear head, with sums in float32 (float64) whatever the inputs are."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Where a half-precision product would also round its result, the head is widened this much at a time, not as a whole.
WIDEN_BYTES = 32 << 20


def multiplies_into_float32(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the device multiplies these half-precision matrices into a float32 result by itself: on CUDA."""
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and weight.is_cuda and torch.version.hip is None


def blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of weight [V, H] in `dtype`, in parts of WIDEN_BYTES if they have to be converted."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(1, WIDEN_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), step):
        columns = slice(start, min(start + step, len(weight)))
        yield columns, weight[columns].to(dtype)


def project(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x @ weight.T to out [n, V]; x [n, H], weight [V, H]."""
    if multiplies_into_float32(x, weight):
        torch.ops.aten.mm.dtype_out(x, weight.t(), out.dtype, out=out)
        return
    x = x.to(out.dtype)
    for columns, part in blocks(weight, out.dtype):
        torch.mm(x, part.t(), out=out[:, columns])


def project_back(dz: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dz @ weight as [n, H] in `dtype`, or in a wider type; dz [n, V], weight [V, H]."""
    if multiplies_into_float32(dz, weight):
        return torch.ops.aten.mm.dtype(dz, weight, dtype)
    total: torch.Tensor | None = None
    for columns, part in blocks(weight, dz.dtype):
        total = torch.mm(dz[:, columns], part) if total is None else total.addmm_(dz[:, columns], part)
    return dz.new_zeros(len(dz), weight.shape[1]) if total is None else total


def add_outer_(total: torch.Tensor, dz: torch.Tensor, x: torch.Tensor) -> None:
    """total [V, H] += dz.T @ x; dz [n, V], x [n, H]."""
    if multiplies_into_float32(x, dz):
        torch.ops.aten.addmm.dtype_out(total, dz.t(), x, total.dtype, out=total)
    else:
        total.addmm_(dz.t().to(total.dtype), x.to(total.dtype))
