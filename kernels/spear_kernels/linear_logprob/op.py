"""`linear_logprob`: log-probability and entropy from hidden states, backward by recomputing the logits per chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import require_shape
from spear_kernels.linear_logprob.head import (
    DEFAULT_CHUNK_BYTES,
    GradientSums,
    Head,
    check_chunk_bytes,
    chunks,
    logits_statistics,
)
from spear_kernels.logprob.rows import RowStatistics, empty_statistics
from spear_kernels.logprob.temperature import Temperature
from spear_kernels.results import LogProbs


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        temperature: Temperature,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = Head.of(hidden, weight, bias)
        stats = empty_statistics(len(hidden), hidden, head.dtype)
        buffer = head.buffer(len(hidden), chunk_bytes)
        for rows in chunks(len(hidden), head.vocab_size, head.dtype, chunk_bytes):
            z = head.logits(hidden[rows].to(head.dtype), temperature.rows(rows), buffer)
            stats.store(rows, logits_statistics(z, ids[rows]))
        ctx.save_for_backward(hidden, weight, bias, ids, stats.peak, stats.log_total, stats.entropy)
        ctx.temperature, ctx.chunk_bytes = temperature, chunk_bytes
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, ids, peak, log_total, entropy = ctx.saved_tensors
        head = Head.of(hidden, weight, bias)
        # The gradient does not read logp, so it was not saved; entropy fills its place.
        stats = RowStatistics(entropy, entropy, peak, log_total)
        temperature: Temperature = ctx.temperature
        d_logp = torch.zeros_like(peak) if d_logp is None else temperature.scale(d_logp)
        d_entropy = None if d_entropy is None else temperature.scale(d_entropy)
        sums = GradientSums.zeros(head, hidden, ctx.needs_input_grad[:3])
        buffer = head.buffer(len(hidden), ctx.chunk_bytes)
        for rows in chunks(len(hidden), head.vocab_size, head.dtype, ctx.chunk_bytes):
            x = hidden[rows].to(head.dtype)
            z = head.logits(x, temperature.rows(rows), buffer)
            part = None if d_entropy is None else d_entropy[rows]
            sums.add(rows, x, z, ids[rows], stats.rows(rows), d_logp[rows], part)
        d_weight = None if sums.weight is None else sums.weight.to(weight.dtype)
        d_bias = None if sums.bias is None or bias is None else sums.bias.to(bias.dtype)
        return sums.hidden, d_weight, d_bias, None, None, None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of `ids` and entropy under softmax((hidden @ weight.T + bias) / temperature), in nats.

    hidden [N, H], weight [V, H], bias [V], any float type; ids int64 [N]; temperature a number or [N]; chunk_bytes
    bounds the logits held at once. Returns logp and entropy [N], float32 (float64 if an input is float64),
    differentiable in hidden, weight and bias. Forward 2 NVH FLOPs; backward recomputes the logits, 6 NVH, of which
    rows with zero gradient pay only the recomputation and a frozen weight saves 2 NVH. Logits and the sum of
    the weight gradient are float32 (float64) whatever the inputs are.

    Raises:
        ValueError: wrong shape, temperature <= 0, chunk_bytes < 1, or a backend that is not available.
    """
    resolve_backend(backend)
    dtype = Head.of(hidden, weight, bias).dtype
    require_shape("ids", ids, (len(hidden),))
    check_chunk_bytes(chunk_bytes)
    scale = Temperature.of(temperature, len(hidden), dtype)
    return LogProbs(*_LinearLogProb.apply(hidden, weight, bias, ids.long(), scale, chunk_bytes))
