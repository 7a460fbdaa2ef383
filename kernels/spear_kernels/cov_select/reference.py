"""The definition of the Clip-Cov and KL-Cov choice, token by token in Python numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spear_kernels.policy_loss.config import PolicyLossConfig

_WORD = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """One output of splitmix64 from state x, unsigned 64 bit."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def priority_reference(seed: int, seq_id: int, position: int) -> int:
    """The 63-bit priority of one token."""
    word = splitmix64(seed & _WORD)
    word = splitmix64(word ^ (seq_id & _WORD))
    return splitmix64(word ^ (position & _WORD)) >> 1


def covariance_select_reference(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor,
    positions: torch.Tensor,
    seed: int = 0,
) -> torch.Tensor:
    """Chosen tokens, bool [N] (arXiv 2505.22617): a random share of the candidates, or the largest covariances."""
    tokens = [n for n in range(len(logp)) if bool(mask[n])]
    chosen = torch.zeros(len(logp), dtype=torch.bool)
    if not tokens or cfg.cov_ratio == 0:
        return chosen
    mean_advantage = sum(float(advantages[n]) for n in tokens) / len(tokens)
    mean_logp = sum(float(logp[n]) for n in tokens) / len(tokens)
    cov = {n: (float(advantages[n]) - mean_advantage) * (float(logp[n]) - mean_logp) for n in tokens}
    draw = {n: priority_reference(seed, int(seq_ids[n]), int(positions[n])) for n in tokens}
    count = max(1, math.floor(cfg.cov_ratio * len(tokens)))
    if cfg.kind == "kl_cov":
        ranked = sorted(tokens, key=lambda n: (-cov[n], draw[n]))
    else:
        ranked = sorted(
            (n for n in tokens if _is_candidate(n, cov[n], logp, old_logp, advantages, cfg)), key=draw.__getitem__
        )
    chosen[ranked[:count]] = True
    return chosen


def _is_candidate(
    n: int,
    cov: float,
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    cfg: PolicyLossConfig,
) -> bool:
    ratio = math.exp(min(max(float(logp[n]) - float(old_logp[n]), -20.0), 20.0))
    plain = -float(advantages[n]) * ratio
    clipped = -float(advantages[n]) * min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
    return cfg.cov_lower < cov < cfg.cov_upper and not clipped > plain
