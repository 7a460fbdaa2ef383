"""`covariance_select`: the Clip-Cov / KL-Cov choice, exact in number, the same for every split and order of the rows.

No step reads a device value on the host, and no row leaves its rank: the k smallest keys are found by radix select
from all-reduced histograms. PyTorch operations are the implementation on every device: some hundred launches on [N]
vectors, once per mini-batch, leave a kernel of our own nothing to gain beside the loss it serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spear_kernels.checks import require_shape
from spear_kernels.cov_select.draw import signed_word
from spear_kernels.cov_select.library import choose_op, covariance_op
from spear_kernels.ranks import group_name
from spear_kernels.ratio import clamp_log_ratio, clip_binds
from spear_kernels.segment_reduce import segment_index, segment_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from spear_kernels.policy_loss.config import PolicyLossConfig


def all_rows(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`mask` as bool [N]; all True if it is None."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def covariance(
    logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor | None, *, group: ProcessGroup | None = None
) -> torch.Tensor:
    """(A - mean A) * (logp - mean logp) over the action tokens of all ranks, float64 [N]; 0 where mask is False.

    logp, advantages [N] float, not needed to be finite where masked out; mask bool [N], None for all rows. The means
    have the same bits for every order and split of the rows, and so each token is always on the same side of a bound.
    They are within a few float64 roundings of the exact ones. If a value of an action token is not finite, all are NaN.

    Raises:
        ValueError: a wrong shape.
    """
    require_shape("advantages", advantages, tuple(logp.shape))
    require_shape("mask", mask, tuple(logp.shape))
    return covariance_op(logp.detach(), advantages.detach(), all_rows(mask, logp), group_name(group))


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


def _token_names(
    mask: torch.Tensor, seq_ids: torch.Tensor | None, positions: torch.Tensor | None, group: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """seq_ids and positions, int64 [N], filled in where None."""
    if group is not None and seq_ids is None and positions is None:
        raise ValueError(
            "seq_ids=None and positions=None with a group give tokens of different ranks the same name and draw; "
            "pass seq_ids that are unique over the ranks"
        )
    seq_ids = torch.zeros_like(mask, dtype=torch.int64) if seq_ids is None else seq_ids.long()
    positions = segment_rank(segment_index(seq_ids), mask) if positions is None else positions.long()
    return seq_ids, positions


def select_by_covariance(
    cov: torch.Tensor,
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    seed: int = 0,
    positions: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """`covariance_select` for a known `covariance` float64 [N], made with the same mask and group."""
    mask = all_rows(mask, logp)
    if cfg.cov_ratio == 0:
        return torch.zeros_like(mask)
    ranks = group_name(group)
    seq_ids, positions = _token_names(mask, seq_ids, positions, ranks)
    by_cov = cfg.kind == "kl_cov"
    candidates = mask if by_cov else _clip_cov_candidates(cov, logp, old_logp, advantages, mask, cfg)
    if row_weight is not None:
        candidates = candidates & (row_weight != 0)
    return choose_op(
        cov.detach() if by_cov else None,
        candidates.detach(),
        mask,
        seq_ids,
        positions,
        float(cfg.cov_ratio),
        signed_word(seed),
        ranks,
    )


def covariance_select(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    seed: int = 0,
    *,
    positions: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Tokens that Clip-Cov drops or KL-Cov penalises, bool [N] (arXiv 2505.22617), for a whole loss batch.

    With n action tokens, max(1, floor(cov_ratio * n)) tokens are chosen, fewer only when there are fewer candidates:
    for "clip_cov" uniformly without replacement among tokens with cov_lower < cov < cov_upper that the surrogate
    does not clip; for "kl_cov" those of largest covariance. cov_ratio = 0 chooses none. A token with row_weight 0
    counts in n and in the means but is never chosen: it has no surrogate to act on.

    logp, old_logp, advantages [N] float; mask bool [N], None for all rows; seq_ids and positions int64 [N] name a token
    to the counter-based generator (`positions` defaults to the rank among the action tokens of its sequence, in row
    order), so the choice depends on (seed, seq_id, position) and the set of tokens only. Tokens that share a name and
    tie are taken by rank, then by row. Pass the rows of all micro-batches at once and hand slices of the result to
    `policy_loss(..., selected=...)`.

    With a `group`, all its ranks must call with the same cfg and seed, each with its own rows, also with none. n, the
    means and the choice are those of all ranks' rows together; each rank gets its part. Sequence ids must then be
    unique over the ranks, and `positions` given if a sequence is cut between ranks. What is sent are counts: about 290
    KiB for "clip_cov", 580 KiB for "kl_cov", whatever N.

    Raises:
        ValueError: cfg.kind is neither "clip_cov" nor "kl_cov", a wrong shape, or a group without names for the tokens.
    """
    if not cfg.uses_covariance:
        raise ValueError(f"kind={cfg.kind!r} selects no tokens; covariance_select needs 'clip_cov' or 'kl_cov'")
    named = {"old_logp": old_logp, "advantages": advantages, "mask": mask, "seq_ids": seq_ids}
    for name, tensor in {**named, "positions": positions, "row_weight": row_weight}.items():
        require_shape(name, tensor, tuple(logp.shape))
    mask = all_rows(mask, logp)
    cov = covariance(logp, advantages, mask, group=group)
    return select_by_covariance(
        cov, logp, old_logp, advantages, mask, cfg, seq_ids, seed, positions, row_weight, group=group
    )
