"""The linear head in row chunks; a chunk of logits is the only thing of width V that exists.

Both linear operators are loops over `Head.chunks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from spear_kernels.checks import compute_dtype, require_matrix, require_shape
from spear_kernels.linear_logprob.products import keeps_float32, project

CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 1 << 30
ROW_ALIGNMENT = 32
"""Elements."""


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """The bytes that chunk_bytes means: None is 64 MiB on the CPU, whose products need no more, and else 1 GiB.

    Raises:
        ValueError: chunk_bytes < 1.
    """
    if chunk_bytes is None:
        return CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1; None takes the default")
    return chunk_bytes


@dataclass(frozen=True)
class Head:
    """The first rows of a head, weight [V, H] and bias [V], and the types it is applied in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    """Type of logits, statistics and sums of gradients."""
    gradient_dtype: torch.dtype
    """Type of the gradient of the logits: that of the weight where products of it are summed in float32."""

    chunk_width: int
    """Columns that the size of chunks is reckoned with: the same on all ranks, whose chunks must agree."""

    @staticmethod
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int, chunk_width: int
    ) -> Head:
        """The head without the padding rows from `vocab_size` on, to be applied to hidden [N, H]."""
        dtype = compute_dtype(hidden, weight)
        weight = weight.detach()[:vocab_size]
        gradient_dtype = weight.dtype if keeps_float32(hidden, weight) else dtype
        return Head(weight, None if bias is None else bias.detach()[:vocab_size], dtype, gradient_dtype, chunk_width)

    @property
    def width(self) -> int:
        """Columns V of the logits."""
        return len(self.weight)

    def chunks(self, start: int, stop: int, chunk_bytes: int) -> list[slice]:
        """Row ranges of nearly equal length from start to stop whose logits fit `chunk_bytes`, at least one row each.

        A separate matrix for the gradient counts too.
        """
        per_logit = self.dtype.itemsize + (self.gradient_dtype.itemsize if self.splits_gradient else 0)
        limit = max(1, chunk_bytes // max(1, self.chunk_width * per_logit))
        count = max(1, -(-(stop - start) // limit))
        ends = [start + (stop - start) * index // count for index in range(count + 1)]
        return [slice(first, last) for first, last in pairwise(ends)]

    @property
    def splits_gradient(self) -> bool:
        """Whether the gradient of the logits needs a matrix of its own, being of another type."""
        return self.gradient_dtype != self.dtype

    def buffer(self, num_rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Unwritten [num_rows, V]; rows start at multiples of 64 bytes, or kernels could not load vectors."""
        stride = -(-self.width // ROW_ALIGNMENT) * ROW_ALIGNMENT
        rows = torch.empty(num_rows, stride, dtype=dtype or self.dtype, device=self.weight.device)
        return rows[:, : self.width]

    def logits(self, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias for x [n, H], written to the first n rows of `buffer`."""
        z = buffer[: len(x)]
        project(x, self.weight, z)
        return z if self.bias is None else z.add_(self.bias)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> None:
    """Raise ValueError unless hidden [N, H], weight [V, H], bias [V] and ids [N] fit each other."""
    require_matrix("hidden", hidden)
    require_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide, weight {weight.shape[1]}; both must be H")
    require_shape("bias", bias, (len(weight),))
    require_shape("ids", ids, (len(hidden),))
