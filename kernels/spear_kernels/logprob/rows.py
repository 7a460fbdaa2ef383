"""Per-row statistics of logits and their gradient, in cache-sized tiles: the inner step of every operator on logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Tiles of this size stay in a core's cache, so the passes over a tile after the first cost no memory traffic.
CPU_TILE_BYTES = 1 << 20
DEVICE_TILE_BYTES = 256 << 20
# exp(-1000) is 0 in float64 too, so flooring changes no probability and keeps 0 * -inf out of the entropy.
FLOOR = -1000.0


@dataclass(frozen=True)
class RowStatistics:
    """Softmax statistics of rows of logits z [n, V]; logsumexp(z) = peak + log_total, kept apart for precision."""

    logp: torch.Tensor  # [n]
    entropy: torch.Tensor  # [n]
    peak: torch.Tensor  # [n], largest logit
    log_total: torch.Tensor  # [n], log of sum exp(z - peak), between 0 and log V

    def rows(self, rows: slice | torch.Tensor) -> RowStatistics:
        """The statistics of some rows."""
        return RowStatistics(self.logp[rows], self.entropy[rows], self.peak[rows], self.log_total[rows])

    def store(self, rows: slice, part: RowStatistics) -> None:
        """Write the statistics of `rows`."""
        self.logp[rows] = part.logp
        self.entropy[rows] = part.entropy
        self.peak[rows] = part.peak
        self.log_total[rows] = part.log_total


def empty_statistics(num_rows: int, like: torch.Tensor, dtype: torch.dtype) -> RowStatistics:
    """Unwritten statistics of `num_rows` rows on the device of `like`."""
    return RowStatistics(*(torch.empty(num_rows, dtype=dtype, device=like.device) for _ in range(4)))


def tiles(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Consecutive row ranges of a [num_rows, width] matrix that fit a tile."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES
    step = max(1, budget // max(1, width * dtype.itemsize))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def tile_statistics(z: torch.Tensor, ids: torch.Tensor) -> RowStatistics:
    """Statistics of one tile z [n, V] of scaled logits (left unchanged) and ids int64 [n]."""
    peak = z.amax(1, keepdim=True)
    shifted = (z - peak).clamp_(min=FLOOR)
    weights = shifted.exp()
    total = weights.sum(1)
    log_total = total.log()
    entropy = log_total - weights.mul_(shifted).sum(1) / total
    peak = peak[:, 0]
    logp = z.gather(1, ids[:, None])[:, 0] - peak - log_total
    return RowStatistics(logp, entropy, peak, log_total)


def tile_gradient_(
    z: torch.Tensor, ids: torch.Tensor, stats: RowStatistics, d_logp: torch.Tensor, d_entropy: torch.Tensor | None
) -> torch.Tensor:
    """Overwrite scaled logits z [n, V] by the gradient of sum(d_logp * logp + d_entropy * entropy).

    dz = a p - b onehot + g p (log p + entropy) with a = b = -d_logp and g = -d_entropy, both [n]; log p = z - peak -
    log_total, so a row needs two scalars: dz = exp(z - peak) * (offset + slope * (z - peak)).
    """
    inverse_total = torch.exp(-stats.log_total)
    z.sub_(stats.peak[:, None])
    if d_entropy is None:
        z.exp_().mul_((-d_logp * inverse_total)[:, None])
    else:
        z.clamp_(min=FLOOR)
        weights = z.exp()
        slope = -d_entropy * inverse_total
        offset = -d_logp * inverse_total + slope * (stats.entropy - stats.log_total)
        z.mul_(slope[:, None]).add_(offset[:, None]).mul_(weights)
    return z.scatter_add_(1, ids[:, None], d_logp[:, None].to(z.dtype))
