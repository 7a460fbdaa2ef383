"""One sweep over row chunks: each chunk of logits is turned into its own gradient while it is at hand.

For a loss that is local to tokens the coefficients of a row are known as soon as its log-prob is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spear_kernels.linear_logprob.counted import add_counted, counted_logits
from spear_kernels.linear_logprob.rows import HeadRows, alive, live_rows, take_coefficients
from spear_kernels.linear_logprob.sums import GradientSums
from spear_kernels.logprob.matrix import partials_table, write_gradient
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

    `inputs` has a row for each of `rows`.
    """
    num_rows, num_live = len(rows), skipping.num_live
    table = torch.empty(4, num_rows, dtype=rows.head.dtype, device=rows.hidden.device)
    d_logp = table.new_zeros(num_rows)
    d_entropy = table.new_zeros(num_rows) if cfg.entropy_coef else None

    def write(place: slice, part: HeadRows, logits: torch.Tensor, out: torch.Tensor) -> None:
        _write_logits(part, place, skipping.count, logits)
        table[:, place], (d_logp[place], part_d_entropy) = _sweep_piece(logits, part, inputs.rows(place), cfg, out)
        if d_entropy is not None and part_d_entropy is not None:
            d_entropy[place] = part_d_entropy

    if num_live:
        for place, part, dz in rows.gradients(num_live, write):
            coefficients = take_coefficients((d_logp, d_entropy), place)
            if skipping.by_device:
                _add_counted(sums, rows, place, part, dz, coefficients)
            else:
                sums.add_live(rows.places(place), part.hidden, dz, live_rows(coefficients))
    if num_live < num_rows:
        table[:, num_live:] = rows.statistics(start=num_live)
    return table, d_logp, table.new_zeros(0) if d_entropy is None else d_entropy


def _write_logits(part: HeadRows, place: slice, count: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write raw logits [n, V] of the rows at `place`; those from `count` on are left as they are."""
    if count is None:
        part.head.logits(part.hidden, out)
    else:
        counted_logits(part.head, part.hidden, (count - place.start).clamp(0, len(part)), out)


def _add_counted(
    sums: GradientSums, rows: HeadRows, place: slice, part: HeadRows, dz: torch.Tensor, coefficients: Coefficients
) -> None:
    """Add a chunk whose rows with a gradient are counted on the device."""
    places, flags = rows.places(place), alive(coefficients)
    if isinstance(places, slice):
        add_counted(sums, places, part.hidden, dz, flags)
        return
    own = sums if sums.hidden is None else replace(sums, hidden=sums.hidden.new_zeros(part.hidden.shape))
    add_counted(own, slice(0, len(part)), part.hidden, dz, flags)
    if sums.hidden is not None and own.hidden is not None:
        sums.hidden.index_copy_(0, places, own.hidden)


Swept = tuple[torch.Tensor, Coefficients]
"""Statistics [4, n] and coefficients [n] of a piece."""


def _sweep_piece(
    z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig, out: torch.Tensor
) -> Swept:
    """Turn raw logits z [n, V] into their gradient in `out`, which may be z."""
    if not part.shard.is_whole:
        return _sweep_shard(z, part, inputs, cfg, out)
    if part.backend == "triton":
        return _sweep_by_kernel(z, part, inputs, cfg, out)
    return _sweep_tiles(z, part, inputs, cfg, out)


def _sweep_shard(
    z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig, out: torch.Tensor
) -> Swept:
    """The statistics need the other shards before the gradient can be known."""
    partials = partials_table(z, part.ids, part.scaling, part.backend)
    table = combine(part.shard.gather(partials[None]))
    coefficients = _coefficients(table[0], inputs, cfg)
    write_gradient(out, z, part.ids, RowStatistics.of(table), coefficients, part.scaling, part.backend)
    return table, coefficients


def _sweep_tiles(
    z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig, out: torch.Tensor
) -> Swept:
    """Tile by tile, so that logits come from memory once."""
    table, d_logp = torch.empty(4, len(z), dtype=z.dtype, device=z.device), z.new_empty(len(z))
    d_entropy = z.new_empty(len(z)) if cfg.entropy_coef else None
    for rows in tiles(len(z), z.shape[1], z.dtype, z.device):
        scaling, own = part.scaling.rows(rows), inputs.rows(rows)

        def loss(logp: torch.Tensor, rows: slice = rows, own: TokenInputs = own) -> Coefficients:
            d_logp[rows], entropy_slope = _coefficients(logp, own, cfg)
            if d_entropy is not None and entropy_slope is not None:
                d_entropy[rows] = entropy_slope
            return take_coefficients((d_logp, d_entropy), rows)

        table[:, rows] = tile_sweep_(scaling.apply_(z[rows]), part.ids[rows], scaling, loss)
    if out is not z:
        out.copy_(z)
    return table, (d_logp, d_entropy)


def _coefficients(logp: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig) -> Coefficients:
    terms = token_terms(logp, inputs, cfg)
    return terms.d_logp, terms.d_entropy


def _sweep_by_kernel(
    z: torch.Tensor, part: HeadRows, inputs: TokenInputs, cfg: PolicyLossConfig, out: torch.Tensor
) -> Swept:
    """One kernel reads a row, derives its coefficients and overwrites it."""
    from spear_kernels.linear_policy_loss.launch import sweep_rows

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
    return table, (d_logp, d_entropy if cfg.entropy_coef else None)
