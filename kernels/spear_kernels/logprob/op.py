"""`logprob`: log-probability and entropy from logits, differentiable, without a float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import compute_dtype, require_matrix, require_shape
from spear_kernels.logprob.rows import RowStatistics, empty_statistics, tile_gradient_, tile_statistics, tiles
from spear_kernels.logprob.temperature import Temperature
from spear_kernels.results import LogProbs


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, temperature: Temperature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(logits)
        stats = empty_statistics(len(logits), logits, dtype)
        for rows in tiles(len(logits), logits.shape[1], dtype, logits.device):
            z = temperature.rows(rows).scale_(logits[rows].to(dtype, copy=True))
            stats.store(rows, tile_statistics(z, ids[rows]))
        ctx.save_for_backward(logits, ids, stats.peak, stats.log_total, stats.entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None) -> tuple[Any, ...]:
        logits, ids, peak, log_total, entropy = ctx.saved_tensors
        # The gradient does not read logp, so it was not saved; entropy fills its place.
        stats = RowStatistics(entropy, entropy, peak, log_total)
        d_logits = torch.empty_like(logits)
        temperature: Temperature = ctx.temperature
        d_logp = torch.zeros_like(peak) if d_logp is None else temperature.scale(d_logp)
        d_entropy = None if d_entropy is None else temperature.scale(d_entropy)
        for rows in tiles(len(logits), logits.shape[1], peak.dtype, logits.device):
            z = temperature.rows(rows).scale_(logits[rows].to(peak.dtype, copy=True))
            part = None if d_entropy is None else d_entropy[rows]
            d_logits[rows] = tile_gradient_(z, ids[rows], stats.rows(rows), d_logp[rows], part)
        return d_logits, None, None


def logprob(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float | torch.Tensor = 1.0, *, backend: str = "auto"
) -> LogProbs:
    """Log-probability of `ids` and entropy of softmax(logits / temperature), in nats.

    logits [N, V] float16, bfloat16, float32 or float64, may hold -inf; ids int64 [N], 0 <= id < V; temperature a number
    or [N]. Returns logp and entropy [N], float32 (float64 for float64 logits), differentiable in `logits` and computed
    in that type. Working memory beyond the gradient is a tile of rows, never [N, V].

    Raises:
        ValueError: wrong shape, temperature <= 0, or a backend that is not available.
    """
    resolve_backend(backend)
    require_matrix("logits", logits)
    require_shape("ids", ids, (len(logits),))
    scale = Temperature.of(temperature, len(logits), compute_dtype(logits))
    return LogProbs(*_LogProb.apply(logits, ids.long(), scale))
