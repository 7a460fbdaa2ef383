"""One sweep over row chunks: each chunk of logits is turned into its own gradient while it is at hand.

For a loss that is local to tokens the coefficients of a row are known as soon as its log-prob is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear_kernels.linear_logprob.counted import add_counted, counted_logits
from spear_kernels.linear_logprob.rows import HeadRows, alive, live_rows
from spear_kernels.linear_logprob.sums import GradientSums
from spear_kernels.logprob.matrix import partials_table
from spear_kernels.logprob.rows import Coefficients, RowStatistics, combine, tile_sweep_, tiles
from spear_kernels.policy_loss.config import KINDS, KL_KINDS, PolicyLossConfig
from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.policy_loss.terms import token_terms


@dataclass(frozen=True)
class Skipping:
    """How rows without a gradient are kept out of the products."""

    num_live: int
    """Rows from here on are known to have no gradient."""
    count: torch.Tensor | None
    """int32 [1] on the device: the rows after that many do not enter; None: all enter."""
    by_device: bool
    """Whether products stop at counts made on the device."""


def sweep(
    rows: HeadRows, skipping: Skipping, inputs: TokenInputs, cfg: PolicyLossConfig, sums: GradientSums
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics [4, n] and coefficients d_logp [n], d_entropy [n] ([0] without entropy term); gradients go to `sums`.

    `inputs` and `sums` have a row for each of `rows`.
    """
    num_live = skipping.num_live
    num_rows = len(rows)
    table = torch.empty(4, num_rows, dtype=rows.head.dtype, device=rows.hidden.device)
    d_logp = table.new_zeros(num_rows)
    d_entropy = table.new_zeros(num_rows if cfg.entropy_coef else 0)
    live, rest = slice(0, num_live), slice(num_live, num_rows)
    buffer = rows.take(live).buffer()
    for place, part in rows.take(live).chunks():
        z = _logits(part, place, skipping.count, buffer)
        table[:, place], coefficients, dz = _sweep_chunk(z, part, inputs.rows(place), cfg)
        d_logp[place] = coefficients[0]
        if coefficients[1] is not None:
            d_entropy[place] = coefficients[1]
        if skipping.by_device:
            add_counted(sums, place, part.hidden, dz, alive(coefficients))
        else:
            sums.add_live(place, part.hidden, dz, live_rows(coefficients))
    if num_live < num_rows:
        table[:, rest] = rows.take(rest).statistics()
    return table, d_logp, d_entropy


def _logits(part: HeadRows, place: slice, count: torch.Tensor | None, buffer: torch.Tensor) -> torch.Tensor:
    """Raw logits [n, V] of the rows at `place`; those from `count` on are left as they are."""
    if count is None:
        return part.head.logits(part.hidden, buffer)
    return counted_logits(part.head, part.hidden, (count - place.start).clamp(0, len(part)), buffer)


Swept = tuple[torch.Tensor, Coefficients, torch.Tensor]
"""Statistics [4, n], coefficients [n] and gradient [n, V] of a chunk."""


def _sweep_chunk(z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig) -> Swept:
    """Turn raw logits z [n, V] into their gradient."""
    if not part.shard.is_whole:
        return _sweep_shard(z, part, inputs, cfg)
    return _sweep_by_kernel(z, part, inputs, cfg) if part.backend == "triton" else _sweep_tiles(z, part, inputs, cfg)


def _sweep_shard(z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig) -> Swept:
    """The statistics need the other shards before the gradient can be known."""
    partials = partials_table(z, part.ids, part.scaling, part.backend)
    table = combine(part.shard.gather(partials[None]))
    coefficients = _coefficients(table[0], inputs, cfg)
    return table, coefficients, part.gradient(z, RowStatistics.of(table), coefficients)


def _sweep_tiles(z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig) -> Swept:
    """Tile by tile, so that logits come from memory once."""
    table, d_logp = torch.empty(4, len(z), dtype=z.dtype, device=z.device), z.new_empty(len(z))
    d_entropy = z.new_empty(len(z)) if cfg.entropy_coef else None
    for rows in tiles(len(z), z.shape[1], z.dtype, z.device):
        scaling, own = part.scaling.rows(rows), inputs.rows(rows)

        def loss(logp: torch.Tensor, rows: slice = rows, own: TokenInputs = own) -> Coefficients:
            slope, entropy_slope = _coefficients(logp, own, cfg)
            d_logp[rows] = slope
            if d_entropy is not None and entropy_slope is not None:
                d_entropy[rows] = entropy_slope
            return slope, entropy_slope

        table[:, rows] = tile_sweep_(scaling.apply_(z[rows]), part.ids[rows], scaling, loss)
    return table, (d_logp, d_entropy), z.to(part.head.gradient_dtype)


def _coefficients(logp: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig) -> Coefficients:
    terms = token_terms(logp, inputs, cfg)
    return terms.d_logp, terms.d_entropy


def _sweep_by_kernel(z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig) -> Swept:
    """One kernel reads a row, derives its coefficients and overwrites it."""
    from spear_kernels.linear_policy_loss.launch import sweep_rows

    out = part.head.buffer(len(z), part.head.gradient_dtype) if part.head.splits_gradient else z
    table, d_logp, d_entropy = sweep_rows(
        z,
        part.ids,
        *part.scaling.numbers,
        inputs.old_logp,
        inputs.advantages,
        inputs.aggregation_weight,
        inputs.row_weight,
        inputs.ref_logp,
        inputs.selected,
        cfg.clip_low,
        cfg.clip_high,
        cfg.dual_clip,
        cfg.kl_cov_coef,
        cfg.kl_coef,
        cfg.entropy_coef,
        KINDS.index(cfg.kind),
        KL_KINDS.index(cfg.kl_kind),
        out,
    )
    return table, (d_logp, d_entropy if cfg.entropy_coef else None), out
