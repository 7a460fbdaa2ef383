"""The token-local formulas: each term's value and its derivative in logp, without autograd.

A loss over (logp, entropy) is fully described by its value and the coefficients d_logp, d_entropy of each token; the
linear operator multiplies them into the gradient of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.ratio import clamp_log_ratio, clip_binds


@dataclass(frozen=True)
class Surrogate:
    """The policy term of each token, [N]."""

    value: torch.Tensor
    d_logp: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor  # bool
    clipped_high: torch.Tensor  # bool
    dual_clipped: torch.Tensor  # bool


@dataclass(frozen=True)
class TokenTerms:
    """All terms before aggregation, and the coefficients after it, [N]."""

    surrogate: Surrogate
    policy: torch.Tensor
    """row_weight * surrogate value."""
    kl: torch.Tensor | None
    """Estimate of KL(policy || reference), unweighted."""
    d_logp: torch.Tensor
    """Derivative of the aggregated loss in logp."""
    d_entropy: torch.Tensor | None
    """Derivative of the aggregated loss in entropy; None when entropy_coef is 0."""


def _clipped(ratio: torch.Tensor, slope: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig) -> Surrogate:
    """max(-A ratio, -A clip(ratio)), then the dual clip; Clip-Cov's choice is zeroed."""
    advantages = inputs.advantages
    low, high = clip_binds(ratio, advantages, cfg.clip_low, cfg.clip_high)
    inactive = low | high
    value = -advantages * torch.where(inactive, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high), ratio)
    dual = torch.zeros_like(low)
    if cfg.dual_clip is not None:
        bound = -advantages * cfg.dual_clip
        dual = (advantages < 0) & (value > bound)
        value = torch.where(dual, bound, value)
        inactive = inactive | dual
    if inputs.selected is not None:
        value = torch.where(inputs.selected, 0, value)
        inactive = inactive | inputs.selected
    return Surrogate(value, torch.where(inactive, 0, -advantages * slope), ratio, low, high, dual)


def _kl_cov(
    log_ratio: torch.Tensor, ratio: torch.Tensor, slope: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig
) -> Surrogate:
    """-A ratio without clipping, plus kl_cov_coef * |logp - old_logp| on the chosen tokens."""
    assert inputs.selected is not None
    never = torch.zeros_like(inputs.mask)
    value = -inputs.advantages * ratio + torch.where(inputs.selected, cfg.kl_cov_coef * log_ratio.abs(), 0)
    d_logp = -inputs.advantages * slope + torch.where(inputs.selected, cfg.kl_cov_coef * log_ratio.sign(), 0)
    return Surrogate(value, d_logp, ratio, never, never, never)


def _cispo(logp: torch.Tensor, ratio: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig) -> Surrogate:
    """-A clip(ratio) logp, where the clipped ratio is a constant weight."""
    low, high = inputs.mask & (ratio < 1 - cfg.clip_low), inputs.mask & (ratio > 1 + cfg.clip_high)
    d_logp = -inputs.advantages * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return Surrogate(d_logp * logp, d_logp, ratio, low, high, torch.zeros_like(low))


def surrogate_terms(
    logp: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig, sequence_ratio: torch.Tensor | None = None
) -> Surrogate:
    """The policy term for cleaned logp [N]; `sequence_ratio` [N] is GSPO's ratio, a constant to each token.

    GSPO's ratio s enters as s * exp(logp - sg[logp]), so its derivative in each token's logp is s.
    """
    log_ratio = logp - inputs.old_logp
    if sequence_ratio is not None:
        return _clipped(sequence_ratio, sequence_ratio, inputs, cfg)
    clamped, inside = clamp_log_ratio(log_ratio)
    ratio = clamped.exp()
    slope = ratio * inside
    if cfg.kind == "kl_cov":
        return _kl_cov(log_ratio, ratio, slope, inputs, cfg)
    if cfg.kind == "cispo":
        return _cispo(logp, ratio, inputs, cfg)
    if cfg.kind == "reinforce":
        never = torch.zeros_like(inputs.mask)
        return Surrogate(-inputs.advantages * logp, -inputs.advantages, ratio, never, never, never)
    return _clipped(ratio, slope, inputs, cfg)


def reference_kl(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's estimators of KL(policy || reference) per token and their derivative in logp, [N] each.

    With d = clamp(logp - ref_logp, -20, 20): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    d, inside = clamp_log_ratio(logp - ref_logp)
    if kind == "k1":
        return d, inside.to(d.dtype)
    if kind == "k2":
        return d.square() / 2, d * inside
    return torch.expm1(-d) + d, -torch.expm1(-d) * inside


def token_terms(
    logp: torch.Tensor, inputs: TokenInputs, cfg: PolicyLossConfig, sequence_ratio: torch.Tensor | None = None
) -> TokenTerms:
    """Values and coefficients for detached logp [N], which must be finite where mask is True."""
    logp = torch.where(inputs.mask, logp, 0)
    surrogate = surrogate_terms(logp, inputs, cfg, sequence_ratio)
    policy, d_logp = surrogate.value, surrogate.d_logp
    if inputs.row_weight is not None:
        policy, d_logp = policy * inputs.row_weight, d_logp * inputs.row_weight
    kl = None
    if inputs.ref_logp is not None:
        kl, d_kl = reference_kl(logp, inputs.ref_logp, cfg.kl_kind)
        if cfg.kl_coef:
            d_logp = d_logp + cfg.kl_coef * d_kl
    d_entropy = -cfg.entropy_coef * inputs.aggregation_weight if cfg.entropy_coef else None
    return TokenTerms(surrogate, policy, kl, d_logp * inputs.aggregation_weight, d_entropy)


def aggregate(
    terms: TokenTerms, entropy: torch.Tensor | None, inputs: TokenInputs, cfg: PolicyLossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its policy part, 0-d each; `entropy` [N] is needed when entropy_coef is not 0."""
    policy = (inputs.aggregation_weight * terms.policy).sum()
    loss = policy
    if cfg.kl_coef and terms.kl is not None:
        loss = loss + cfg.kl_coef * (inputs.aggregation_weight * terms.kl).sum()
    if cfg.entropy_coef and entropy is not None:
        loss = loss - cfg.entropy_coef * (inputs.aggregation_weight * torch.where(inputs.mask, entropy, 0)).sum()
    return loss, policy
