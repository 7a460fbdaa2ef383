"""Statistics and gradient of a whole matrix of logits, by either backend; logits of any row count, also none."""

from __future__ import annotations

import torch

from spear_kernels.checks import compute_dtype
from spear_kernels.logprob.rows import Coefficients, RowStatistics, combine, tile_gradient_, tile_partials_, tiles
from spear_kernels.logprob.scaling import Scaling


def partials_table(logits: torch.Tensor, ids: torch.Tensor, scaling: Scaling, backend: str) -> torch.Tensor:
    """Partial statistics [4, N] of one shard's raw logits [N, V] and local ids [N]."""
    if backend == "triton" and scaling.vocab_size:
        from spear_kernels.logprob.launch import row_partials

        return row_partials(logits, ids, *scaling.numbers)
    dtype = compute_dtype(logits)
    partials = torch.empty(4, len(logits), dtype=dtype, device=logits.device)
    for rows in tiles(len(logits), scaling.vocab_size, dtype, logits.device):
        partials[:, rows] = tile_partials_(_scaled(logits, rows, scaling, dtype), ids[rows])[0]
    return partials


def statistics_table(logits: torch.Tensor, ids: torch.Tensor, scaling: Scaling, backend: str) -> torch.Tensor:
    """Statistics [4, N] of raw logits [N, V] that are the whole vocabulary."""
    if backend == "triton":
        from spear_kernels.logprob.launch import row_statistics

        return row_statistics(logits, ids, *scaling.numbers)
    return combine(partials_table(logits, ids, scaling, backend)[None])


def write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    stats: RowStatistics,
    coefficients: Coefficients,
    scaling: Scaling,
    backend: str,
) -> None:
    """Write the gradient in raw logits [N, V] to `out`, which may be `logits`, and zeros to its padding columns."""
    d_logp, d_entropy = coefficients
    if backend == "triton" and scaling.vocab_size:
        from spear_kernels.logprob.launch import row_gradient

        saved = stats.entropy, stats.peak, stats.log_total
        row_gradient(logits, ids, *saved, d_logp, d_entropy, *scaling.numbers, out)
        return
    dtype = compute_dtype(logits)
    for rows in tiles(len(logits), scaling.vocab_size, dtype, logits.device):
        part = d_logp[rows], None if d_entropy is None else d_entropy[rows]
        z = _scaled(logits, rows, scaling, dtype)
        dz = tile_gradient_(z, ids[rows], stats.rows(rows), part, scaling.rows(rows))
        out[rows, : scaling.vocab_size] = dz
    out[:, scaling.vocab_size :].zero_()


def _scaled(logits: torch.Tensor, rows: slice, scaling: Scaling, dtype: torch.dtype) -> torch.Tensor:
    """A scaled copy of some rows."""
    return scaling.rows(rows).apply_(logits[rows, : scaling.vocab_size].to(dtype, copy=True))
