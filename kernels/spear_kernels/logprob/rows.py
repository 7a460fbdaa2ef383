"""Per-row statistics of logits and their gradient, in cache-sized tiles: the inner step of every operator on logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from spear_kernels.checks import host_may_wait
from spear_kernels.logprob.scaling import Scaling

# Tiles of this size stay in a core's cache, so the passes over a tile after the first cost no memory traffic.
CPU_TILE_BYTES = 1 << 20
DEVICE_TILE_BYTES = 256 << 20
# exp(-1000) is 0 in float64 too, so flooring changes no probability and keeps 0 * -inf out of the entropy.
FLOOR = -1000.0

Coefficients = tuple[torch.Tensor, torch.Tensor | None]
"""Derivatives of a loss in logp and entropy, [n] each; None for an entropy that it does not read."""


@dataclass(frozen=True)
class RowStatistics:
    """Softmax statistics of rows of logits z [n, V]; logsumexp(z) = peak + log_total, kept apart for precision."""

    logp: torch.Tensor  # [n]
    entropy: torch.Tensor  # [n]
    peak: torch.Tensor  # [n], largest logit
    log_total: torch.Tensor  # [n], log of sum exp(z - peak), between 0 and log V

    @staticmethod
    def of(table: torch.Tensor) -> RowStatistics:
        """The columns of a table [4, n]."""
        return RowStatistics(*table.unbind())

    def rows(self, rows: slice | torch.Tensor) -> RowStatistics:
        """The statistics of some rows."""
        return RowStatistics(self.logp[rows], self.entropy[rows], self.peak[rows], self.log_total[rows])


def tiles(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Consecutive row ranges of a [num_rows, width] matrix that fit a tile."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES
    step = max(1, budget // max(1, width * dtype.itemsize))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


@dataclass(frozen=True)
class Weighing:
    """Probabilities of a tile as weights * factor, which saves a pass over the tile."""

    weights: torch.Tensor  # [n, V]
    factor: torch.Tensor  # [n]


def tile_partials_(z: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, Weighing]:
    """Partial statistics [4, n] of one tile of scaled logits z [n, V], and its probabilities; z becomes z - peak.

    The four are peak, total = sum exp(z - peak), weighted = sum exp(z - peak) (z - peak) and the logit of the token;
    an id outside 0..V-1 belongs to another shard of the vocabulary and has logit -inf here.
    """
    target = target_logit(z, ids)
    if z.shape[1] == 0:
        nothing = torch.zeros_like(target)
        return torch.stack([target, nothing, nothing, target]), Weighing(z, nothing)
    peak = z.amax(1)
    nothing = peak == -torch.inf
    z.sub_(torch.where(nothing, 0, peak)[:, None]).clamp_(min=FLOOR)
    # One fused pass; torch's normaliser is off by 1e-5 at times, so that the result is normalised once more.
    weights = torch.softmax(z, 1)
    mass, largest = weights.sum(1), weights.amax(1)
    # The largest weight is exp(0) / normaliser.
    total = torch.where(nothing, 0, mass / largest)
    weighted = torch.where(nothing, 0, torch.linalg.vecdot(weights, z) / largest)
    return torch.stack([peak, total, weighted, target]), Weighing(weights, mass.reciprocal())


def target_logit(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """z[n, ids[n]] as [n], -inf where the id is none of the columns."""
    if z.shape[1] == 0:
        return torch.full_like(ids, -torch.inf, dtype=z.dtype)
    inside, column = _columns(z, ids)
    return torch.where(inside, z.gather(1, column[:, None])[:, 0], -torch.inf)


def merge(partials: torch.Tensor) -> torch.Tensor:
    """The partials [4, n] of S parts of the vocabulary together, from [S, 4, n]."""
    peaks, totals, weighted, targets = partials.unbind(1)
    peak = peaks.amax(0)
    # A part without any finite logit has total 0; its distance to the peak must not become 0 * inf.
    distance = torch.where(peaks == -torch.inf, 0, peaks - peak)
    share = distance.exp()
    total, weighted = (totals * share).sum(0), ((weighted + distance * totals) * share).sum(0)
    return torch.stack([peak, total, weighted, targets.amax(0)])


def combine(partials: torch.Tensor) -> torch.Tensor:
    """Statistics [4, n] (logp, entropy, peak, log_total) from the partials [S, 4, n] of S parts of the vocabulary.

    A row of -inf alone has logp -inf and entropy 0.
    """
    peak, total, weighted, target = merge(partials).unbind()
    nothing, log_total = total == 0, total.log()
    logp = torch.where(nothing, -torch.inf, target - peak - log_total)
    entropy = torch.where(nothing, 0, log_total - weighted / total)
    return torch.stack([logp, entropy, peak, log_total])


def tile_gradient_(
    z: torch.Tensor, ids: torch.Tensor, stats: RowStatistics, coefficients: Coefficients, scaling: Scaling
) -> torch.Tensor:
    """Overwrite scaled logits z [n, V] by the gradient of sum(d_logp * logp + d_entropy * entropy) in raw logits.

    dz = a p - b onehot + g p (log p + entropy) with a = b = -d_logp and g = -d_entropy, both [n].
    """
    slope = scaling.slope(z)
    nothing = stats.log_total == -torch.inf
    shifted = z.sub_(torch.where(nothing, 0, stats.peak)[:, None]).clamp_(min=FLOOR)
    weighing = Weighing(shifted.exp(), torch.where(nothing, 0, torch.exp(-stats.log_total)))
    return _gradient_(shifted, weighing, ids, stats, coefficients, scaling, slope)


def tile_sweep_(
    z: torch.Tensor, ids: torch.Tensor, scaling: Scaling, loss: Callable[[torch.Tensor], Coefficients]
) -> torch.Tensor:
    """Overwrite scaled logits z [n, V] by the gradient of a loss whose coefficients `loss` gives for logp [n].

    Returns the statistics [4, n]. One exponential per logit serves the statistics and the gradient.
    """
    slope = scaling.slope(z)
    partials, weighing = tile_partials_(z, ids)
    table = combine(partials[None])
    _gradient_(z, weighing, ids, RowStatistics.of(table), loss(table[0]), scaling, slope)
    return table


def _gradient_(
    shifted: torch.Tensor,
    weighing: Weighing,
    ids: torch.Tensor,
    stats: RowStatistics,
    coefficients: Coefficients,
    scaling: Scaling,
    slope: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient in raw logits, written over z - peak [n, V]; log p is that less log_total.

    It is 0 in rows of -inf alone and in rows without coefficients, whatever their logits hold.
    """
    d_logp, d_entropy = (None if part is None else scaling.per_unit(part) for part in coefficients)
    assert d_logp is not None
    idle = (d_logp == 0) if d_entropy is None else (d_logp == 0) & (d_entropy == 0)
    idle = idle | (stats.log_total == -torch.inf)
    weights, factor = weighing.weights, weighing.factor
    if d_entropy is None:
        torch.mul(weights, (-d_logp * factor)[:, None], out=shifted)
    else:
        offset = -d_logp - d_entropy * (stats.entropy - stats.log_total)
        shifted.mul_((-d_entropy * factor)[:, None]).add_((offset * factor)[:, None]).mul_(weights)
    if shifted.shape[1]:
        inside, column = _columns(shifted, ids)
        shifted.scatter_add_(1, column[:, None], torch.where(inside, d_logp, 0)[:, None])
    if slope is not None:
        shifted.mul_(slope)
    if not host_may_wait(idle) or bool(idle.any()):
        shifted.masked_fill_(idle[:, None], 0)
    return shifted


def _columns(z: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each id is a column of z, and a column that exists in any case."""
    return (ids >= 0) & (ids < z.shape[1]), ids.clamp(0, z.shape[1] - 1)
