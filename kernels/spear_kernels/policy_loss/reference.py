"""The definition of every policy loss, written with autograd, one sequence at a time."""

from __future__ import annotations

import torch

from spear_kernels.policy_loss.config import PolicyLossConfig


def _clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, cfg: PolicyLossConfig) -> torch.Tensor:
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if cfg.dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * cfg.dual_clip), loss)


def _surrogate(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    selected: torch.Tensor,
    cfg: PolicyLossConfig,
) -> torch.Tensor:
    """Token losses of the action tokens of one sequence, [n]."""
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    if cfg.kind == "kl_cov":
        return -advantages * ratio + selected * cfg.kl_cov_coef * (logp - old_logp).abs()
    if cfg.kind == "cispo":
        return -ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high).detach() * advantages * logp
    if cfg.kind == "reinforce":
        return -advantages * logp
    if cfg.kind == "gspo":
        sequence_ratio = (logp - old_logp).mean().clamp(max=10).exp().detach()
        ratio = sequence_ratio * torch.exp(logp - logp.detach())
    loss = _clipped_surrogate(ratio, advantages, cfg)
    return torch.where(selected, 0, loss) if cfg.kind == "clip_cov" else loss


def _kl(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str) -> torch.Tensor:
    d = (logp - ref_logp).clamp(-20, 20)
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def policy_loss_reference(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor,
    entropy: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss, 0-d, in the type of logp [N]; `selected` bool [N] is the choice of covariance_select_reference."""
    sums, means, num_tokens = [], [], 0
    for seq_id in seq_ids[mask].unique():
        rows = mask & (seq_ids == seq_id)
        chosen = torch.zeros_like(mask) if selected is None else selected
        token_loss = _surrogate(logp[rows], old_logp[rows], advantages[rows], chosen[rows], cfg)
        if row_weight is not None:
            token_loss = token_loss * row_weight[rows]
        if sampler_logp is not None:
            gap = (old_logp[rows] - sampler_logp[rows]).clamp(-20, 20)
            token_loss = token_loss * gap.exp().clamp(max=cfg.tis_cap)
        if ref_logp is not None:
            token_loss = token_loss + cfg.kl_coef * _kl(logp[rows], ref_logp[rows], cfg.kl_kind)
        if entropy is not None:
            token_loss = token_loss - cfg.entropy_coef * entropy[rows]
        sums.append(token_loss.sum())
        means.append(token_loss.mean())
        num_tokens += len(token_loss)
    if not sums:
        return logp[mask].sum()
    total = torch.stack(sums)
    if cfg.aggregation == "token-mean":
        return total.sum() / num_tokens
    if cfg.aggregation == "seq-mean-token-mean":
        return torch.stack(means).mean()
    if cfg.aggregation == "seq-mean-token-sum-norm":
        assert cfg.norm_length is not None
        return total.mean() / cfg.norm_length
    return total.mean()
