"""The linear head in row chunks: logits of a chunk, and the sums its gradient adds to.

Both linear operators are loops over these steps; a chunk of logits is the only thing of width V that exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spear_kernels.checks import compute_dtype, host_may_wait, require_matrix, require_shape
from spear_kernels.logprob.rows import RowStatistics, empty_statistics, tile_gradient_, tile_statistics, tiles
from spear_kernels.logprob.temperature import Temperature

DEFAULT_CHUNK_BYTES = 64 << 20
# A half-precision head is widened this much at a time, not as a whole.
WIDEN_BYTES = 32 << 20


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Raise ValueError unless there is room for something."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1")


def chunks(num_rows: int, width: int, dtype: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    """Row ranges of nearly equal length whose [rows, width] logits fit `chunk_bytes` (at least one row each)."""
    limit = max(1, chunk_bytes // max(1, width * dtype.itemsize))
    count = -(-num_rows // limit)
    for index in range(count):
        yield slice(num_rows * index // count, num_rows * (index + 1) // count)


@dataclass(frozen=True)
class Head:
    """weight [V, H] and bias [V] applied in `dtype`, the type of logits and gradients sums."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
        """Check hidden [N, H] against weight [V, H] and bias [V]; raise ValueError if they do not fit."""
        require_matrix("hidden", hidden)
        require_matrix("weight", weight)
        if hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"hidden is {hidden.shape[1]} wide, weight {weight.shape[1]}; both must be H")
        require_shape("bias", bias, (len(weight),))
        return Head(weight.detach(), None if bias is None else bias.detach(), compute_dtype(hidden, weight))

    @property
    def vocab_size(self) -> int:
        """Rows V of the weight."""
        return len(self.weight)

    def buffer(self, num_rows: int, chunk_bytes: int) -> torch.Tensor:
        """Storage for the logits of the largest chunk, [rows, V]."""
        rows = max((c.stop - c.start for c in chunks(num_rows, self.vocab_size, self.dtype, chunk_bytes)), default=0)
        return torch.empty(rows, self.vocab_size, dtype=self.dtype, device=self.weight.device)

    def logits(self, x: torch.Tensor, temperature: Temperature, buffer: torch.Tensor) -> torch.Tensor:
        """(x @ weight.T + bias) / temperature for x [n, H] in `dtype`, written to the first n rows of `buffer`."""
        z = buffer[: len(x)]
        for columns, weight in self._blocks():
            torch.mm(x, weight.t(), out=z[:, columns])
        if self.bias is not None:
            z.add_(self.bias)
        return temperature.scale_(z)

    def hidden_gradient(self, dz: torch.Tensor) -> torch.Tensor:
        """dz @ weight, [n, H] in `dtype`."""
        total = torch.zeros(len(dz), self.weight.shape[1], dtype=self.dtype, device=dz.device)
        for columns, weight in self._blocks():
            total.addmm_(dz[:, columns], weight)
        return total

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for columns in chunks(self.vocab_size, self.weight.shape[1], self.dtype, WIDEN_BYTES):
            yield columns, self.weight[columns].to(self.dtype)


def logits_statistics(z: torch.Tensor, ids: torch.Tensor) -> RowStatistics:
    """Statistics of scaled logits z [n, V], tile by tile."""
    stats = empty_statistics(len(z), z, z.dtype)
    for rows in tiles(len(z), z.shape[1], z.dtype, z.device):
        stats.store(rows, tile_statistics(z[rows], ids[rows]))
    return stats


@dataclass
class GradientSums:
    """Gradients of hidden (float type of `hidden`), weight and bias (float32 or float64); None where not wanted."""

    head: Head
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @staticmethod
    def zeros(head: Head, hidden: torch.Tensor, wanted: tuple[bool, bool, bool]) -> GradientSums:
        """Zero sums for those of (hidden, weight, bias) that are `wanted`."""
        like = {"dtype": head.dtype, "device": hidden.device}
        return GradientSums(
            head,
            torch.zeros_like(hidden) if wanted[0] else None,
            torch.zeros(head.weight.shape, **like) if wanted[1] else None,
            torch.zeros(head.vocab_size, **like) if wanted[2] else None,
        )

    def add(
        self,
        rows: slice,
        x: torch.Tensor,
        z: torch.Tensor,
        ids: torch.Tensor,
        stats: RowStatistics,
        d_logp: torch.Tensor,
        d_entropy: torch.Tensor | None,
    ) -> None:
        """Add a chunk: x [n, H] and scaled logits z [n, V] (destroyed), coefficients [n] per unit of scaled logit.

        `rows` are the chunk's places in `hidden`. On the CPU, rows whose coefficients are zero are squeezed out
        before the matrix products; elsewhere counting them would make the host wait, so they pass through as zeros.
        """
        live = live_rows(d_logp, d_entropy)
        dz = _gradient_of_live_rows(z, ids, stats, d_logp, d_entropy, live)
        if live is not None:
            x = x[live]
        if self.hidden is not None:
            d_hidden = self.head.hidden_gradient(dz).to(self.hidden.dtype)
            if live is None:
                self.hidden[rows] = d_hidden
            else:
                self.hidden[rows].index_copy_(0, live, d_hidden)
        if self.weight is not None:
            self.weight.addmm_(dz.t(), x)
        if self.bias is not None:
            self.bias.add_(dz.sum(0))


def live_rows(d_logp: torch.Tensor, d_entropy: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of rows with a coefficient other than zero, or None when all rows are kept (always, off the CPU)."""
    if not host_may_wait(d_logp):
        return None
    alive = d_logp != 0
    if d_entropy is not None:
        alive |= d_entropy != 0
    live = alive.nonzero()[:, 0]
    return None if len(live) == len(alive) else live


def _gradient_of_live_rows(
    z: torch.Tensor,
    ids: torch.Tensor,
    stats: RowStatistics,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    live: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient rows of `live`, moved to the front of z; the result is a view of z."""
    num_live = len(z) if live is None else len(live)
    for place in tiles(num_live, z.shape[1], z.dtype, z.device):
        rows = place if live is None else live[place]
        part = None if d_entropy is None else d_entropy[rows]
        # Indices ascend, so a row moves forward onto rows already read.
        dz = tile_gradient_(z[rows], ids[rows], stats.rows(rows), d_logp[rows], part)
        if live is not None:
            z[place] = dz
    return z[:num_live]
