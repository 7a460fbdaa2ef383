"""The importance ratio and its clipping rule, shared by the losses and by the covariance selection."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 nats before exp; beyond, the value is constant and the gradient 0."""


def clamp_log_ratio(log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamped log-ratio [N], and whether the clamp left it alone (bool [N])."""
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clamped, clamped == log_ratio


def clip_binds(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the clipped surrogate exceeds the plain one: (below 1 - clip_low, above 1 + clip_high), bool [N] each.

    -A clip(ratio) > -A ratio holds exactly for A < 0 below the range and for A > 0 above it.
    """
    return (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)


def truncated_importance(
    old_logp: torch.Tensor, sampler_logp: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights min(exp(clamp(old_logp - sampler_logp, +-20)), cap) [N], and where the cap binds, bool [N].

    Truncated importance sampling for the gap between the sampler's and the trainer's log-probs of the same tokens (Yao
    et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    https://fengyao.notion.site/off-policy-rl).
    """
    weight = clamp_log_ratio(old_logp - sampler_logp)[0].exp()
    return weight.clamp(max=cap), weight > cap
