"""What the loss of on-policy rows and of replayed rows means, in the kernels' terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from spear_kernels import PolicyLossConfig


def on_policy_terms(
    *,
    kind: Literal["ppo", "clip_cov", "kl_cov", "gspo", "cispo", "reinforce"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    cov_ratio: float,
    cov_lower: float,
    cov_upper: float,
    kl_cov_coef: float,
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"],
    norm_length: int | None,
    max_tokens: int,
    entropy_coef: float,
    kl_coef: float,
    kl_kind: Literal["k1", "k2", "k3"],
) -> PolicyLossConfig:
    """Return the loss of freshly sampled rows.

    `norm_length` (tokens) divides the token sums of "seq-mean-token-sum-norm"; None takes `max_tokens`, the longest
    trajectory, which makes it the constant of Dr.GRPO (arXiv 2503.20783).
    """
    return PolicyLossConfig(
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        cov_ratio=cov_ratio,
        cov_lower=cov_lower,
        cov_upper=cov_upper,
        kl_cov_coef=kl_cov_coef,
        aggregation=aggregation,
        norm_length=max_tokens if norm_length is None else norm_length,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
    )


def replay_terms(
    on_policy: PolicyLossConfig, *, cov_ratio: float, cov_lower: float, cov_upper: float
) -> PolicyLossConfig:
    """Return the loss of replayed rows: the same surrogate with its own covariance bounds, no entropy and no KL term.

    Source: SPEAR (arXiv 2509.22601), L_SIL.
    """
    return replace(
        on_policy, cov_ratio=cov_ratio, cov_lower=cov_lower, cov_upper=cov_upper, entropy_coef=0.0, kl_coef=0.0
    )
