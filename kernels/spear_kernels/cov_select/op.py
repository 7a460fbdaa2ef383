"""`covariance_select`: the Clip-Cov / KL-Cov choice, exact in number, the same for every split and order of the rows.

No step reads a device value on the host: counts stay 0-d tensors, and the k smallest are found by sorting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spear_kernels.checks import require_shape
from spear_kernels.cov_select.draw import priorities
from spear_kernels.ratio import clamp_log_ratio, clip_binds
from spear_kernels.segment_reduce import segment_index, segment_rank

if TYPE_CHECKING:
    from spear_kernels.policy_loss.config import PolicyLossConfig


def covariance(logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A - mean A) * (logp - mean logp) over the action tokens, float64 [N]; 0 where mask is False.

    float64 keeps the means, and so every token's side of a bound, from depending on the order of summation.
    """
    num_tokens = mask.sum().clamp(min=1)
    advantages = torch.where(mask, advantages.detach(), 0).double()
    logp = torch.where(mask, logp.detach(), 0).double()
    product = (advantages - advantages.sum() / num_tokens) * (logp - logp.sum() / num_tokens)
    return torch.where(mask, product, 0)


def _first(order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Bool [N], True for the rows that `order` lists in its first `count` (0-d) places."""
    chosen = torch.arange(len(order), device=order.device) < count
    return torch.empty_like(chosen).scatter_(0, order, chosen)


def _clip_cov_candidates(
    cov: torch.Tensor,
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
) -> torch.Tensor:
    """Bool [N]: covariance strictly between the bounds, and the surrogate not already clipped."""
    log_ratio, _ = clamp_log_ratio((logp - old_logp).detach())
    low, high = clip_binds(log_ratio.exp(), advantages, cfg.clip_low, cfg.clip_high)
    return mask & (cov > cfg.cov_lower) & (cov < cfg.cov_upper) & ~(low | high)


def select_by_covariance(
    cov: torch.Tensor,
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    seed: int = 0,
    positions: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`covariance_select` for a known `covariance` float64 [N]."""
    if cfg.cov_ratio == 0:
        return torch.zeros_like(mask)
    seq_ids = torch.zeros_like(mask, dtype=torch.int64) if seq_ids is None else seq_ids.long()
    positions = segment_rank(segment_index(seq_ids), mask) if positions is None else positions.long()
    draw = priorities(seed, seq_ids, positions)
    if cfg.kind == "kl_cov":
        candidates = mask
        rank_by = torch.where(mask, -cov, torch.inf)
    else:
        candidates = _clip_cov_candidates(cov, logp, old_logp, advantages, mask, cfg)
        rank_by = (~candidates).long()
    if row_weight is not None:
        candidates = candidates & (row_weight != 0)
        rank_by = torch.where(candidates, rank_by, torch.inf)
    # Two stable sorts order by (rank_by, draw); the draw also breaks ties of equal covariance.
    order = torch.argsort(draw, stable=True)
    order = order[torch.argsort(rank_by[order], stable=True)]
    count = torch.floor(mask.sum().double() * cfg.cov_ratio).clamp(min=1)
    return _first(order, count) & candidates


def covariance_select(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    seed: int = 0,
    *,
    positions: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens that Clip-Cov drops or KL-Cov penalises, bool [N] (arXiv 2505.22617), for a whole loss batch.

    With n action tokens, max(1, floor(cov_ratio * n)) tokens are chosen, fewer only when there are fewer candidates:
    for "clip_cov" uniformly without replacement among tokens with cov_lower < cov < cov_upper that the surrogate
    does not clip; for "kl_cov" those of largest covariance. cov_ratio = 0 chooses none. A token with row_weight 0
    counts in n and in the means but is never chosen: it has no surrogate to act on.

    logp, old_logp, advantages [N] float; mask bool [N]; seq_ids and positions int64 [N] name a token to the
    counter-based generator (`positions` defaults to the rank among the action tokens of its sequence, in row order), so
    the choice depends on (seed, seq_id, position) and the set of tokens only. Pass the rows of all micro-batches and
    ranks at once and hand slices of the result to `policy_loss(..., selected=...)`.

    Raises:
        ValueError: cfg.kind is neither "clip_cov" nor "kl_cov", or a wrong shape.
    """
    if not cfg.uses_covariance:
        raise ValueError(f"kind={cfg.kind!r} selects no tokens; covariance_select needs 'clip_cov' or 'kl_cov'")
    named = {"old_logp": old_logp, "advantages": advantages, "mask": mask, "seq_ids": seq_ids}
    for name, tensor in {**named, "positions": positions, "row_weight": row_weight}.items():
        require_shape(name, tensor, tuple(logp.shape))
    mask = mask.bool()
    cov = covariance(logp, advantages, mask)
    return select_by_covariance(
        cov, logp, old_logp, advantages, mask, cfg, seq_ids, seed, positions=positions, row_weight=row_weight
    )
