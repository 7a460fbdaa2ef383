"""The linear head, and how many rows of logits and of their gradient exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from spear_kernels.checks import compute_dtype, require_matrix, require_shape
from spear_kernels.linear_logprob.products import multiplies_into_float32, project

CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 1 << 30
ROW_ALIGNMENT = 32
"""Elements."""
ROWS_OF_A_TILE = 128
"""Matrix products work on tiles of so many rows, of which the last one of a chunk should be full."""


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """The bytes that chunk_bytes means: None is 64 MiB on the CPU, whose products need no more, and else 1 GiB.

    Raises:
        ValueError: chunk_bytes is not an integer, or below 1.
    """
    if chunk_bytes is None:
        return CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    if isinstance(chunk_bytes, float) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be a whole number of at least 1; None takes the default")
    return chunk_bytes


def cut(num_rows: int, limit: int) -> list[slice]:
    """Ranges of about equal length that cover num_rows, at most `limit` long, in full tiles where they are long."""
    tile = ROWS_OF_A_TILE if limit >= 2 * ROWS_OF_A_TILE else 1
    limit = limit // tile * tile
    count = max(1, -(-num_rows // limit))
    length = min(limit, -(-num_rows // (count * tile)) * tile)
    ends = [*range(0, num_rows, max(length, 1)), num_rows] if num_rows else [0, 0]
    return [slice(first, last) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class Head:
    """The first rows of a head, weight [V, H] and bias [V], and the types it is applied in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    """Type of logits, statistics and sums of gradients."""
    gradient_dtype: torch.dtype
    """Type of the gradient of the logits: bfloat16 where products of it are summed in float32."""
    chunk_width: int
    """Columns that the size of chunks is reckoned with: the same on all ranks, whose chunks must agree."""

    @staticmethod
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int, chunk_width: int
    ) -> Head:
        """The head without the padding rows from `vocab_size` on, to be applied to hidden [N, H]."""
        dtype = compute_dtype(hidden, weight)
        weight = weight.detach()[:vocab_size]
        # Gradients of a mean over many tokens lie below the smallest number of float16.
        half = weight.dtype == torch.bfloat16 and multiplies_into_float32(hidden, weight)
        bias = None if bias is None else bias.detach()[:vocab_size]
        return Head(weight, bias, dtype, torch.bfloat16 if half else dtype, chunk_width)

    @property
    def width(self) -> int:
        """Columns V of the logits."""
        return self.weight.shape[0]

    @property
    def splits_gradient(self) -> bool:
        """Whether the gradient of the logits needs a matrix of its own, being of another type."""
        return self.gradient_dtype != self.dtype

    def rows_in(self, num_bytes: int, dtype: torch.dtype) -> int:
        """Rows of logits of that type that fit `num_bytes`, at least one."""
        return max(1, num_bytes // max(1, self.chunk_width * dtype.itemsize))

    def gradient_rows(self, chunk_bytes: int) -> int:
        """Rows whose gradient exists at once; a matrix of its own takes three quarters of the budget.

        The sum of the weight gradient is read and written once for so many rows, so they should be many.
        """
        share = chunk_bytes * 3 // 4 if self.splits_gradient else chunk_bytes
        return self.rows_in(share, self.gradient_dtype)

    def logits_rows(self, chunk_bytes: int) -> int:
        """Rows whose logits exist at once while their gradient is made."""
        return self.rows_in(chunk_bytes // 4 if self.splits_gradient else chunk_bytes, self.dtype)

    def buffer(self, num_rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Unwritten [num_rows, V]; rows start at multiples of 64 bytes, or kernels could not load vectors."""
        stride = -(-self.width // ROW_ALIGNMENT) * ROW_ALIGNMENT
        rows = torch.empty(num_rows, stride, dtype=dtype or self.dtype, device=self.weight.device)
        return rows[:, : self.width]

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias for x [n, H], written to out [n, V]."""
        project(x, self.weight, out)
        return out if self.bias is None else out.add_(self.bias)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> None:
    """Raise ValueError unless hidden [N, H], weight [V, H], bias [V] and integer ids [N] fit each other."""
    require_matrix("hidden", hidden)
    require_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide, weight {weight.shape[1]}; both must be H")
    require_shape("bias", bias, (weight.shape[0],))
    require_shape("ids", ids, (hidden.shape[0],))
