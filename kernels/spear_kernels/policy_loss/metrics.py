"""What a policy loss reports: detached 0-d tensors, means over the action tokens of the call."""

from __future__ import annotations

import torch

from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.policy_loss.terms import TokenTerms
from spear_kernels.ratio import clamp_log_ratio


def _quantile(values: torch.Tensor, mask: torch.Tensor, num_tokens: torch.Tensor, share: float) -> torch.Tensor:
    """The value at rank floor(share * (n - 1)) of the action tokens, without counting them on the host."""
    ordered = torch.where(mask, values, torch.inf).sort().values
    rank = ((num_tokens - 1).clamp(min=0) * share).long()
    return ordered.gather(0, rank.reshape(1))[0]


def _covariance_metrics(cov: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ("cov_mean", "cov_p50", "cov_p99", "cov_max")
    if len(cov) == 0:
        return {name: torch.zeros((), device=cov.device) for name in names}
    num_tokens = mask.sum()
    values = (
        cov.sum() / num_tokens.clamp(min=1),
        _quantile(cov, mask, num_tokens, 0.5),
        _quantile(cov, mask, num_tokens, 0.99),
        _quantile(cov, mask, num_tokens, 1.0),
    )
    return {name: torch.where(num_tokens > 0, value, 0).float() for name, value in zip(names, values, strict=True)}


def policy_metrics(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: TokenInputs,
    terms: TokenTerms,
    cov: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Means over action tokens of detached per-token quantities [N]; weight them by num_tokens to combine calls."""
    mask, dtype = inputs.mask, inputs.old_logp.dtype
    num_tokens = mask.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values.to(dtype), 0).sum() / num_tokens.clamp(min=1)

    surrogate = terms.surrogate
    log_ratio = torch.where(mask, logp, 0) - inputs.old_logp
    clamped, _ = clamp_log_ratio(log_ratio)
    metrics = {
        "clip_fraction": mean(surrogate.clipped_low | surrogate.clipped_high),
        "clip_fraction_low": mean(surrogate.clipped_low),
        "clip_fraction_high": mean(surrogate.clipped_high),
        "dual_clip_fraction": mean(surrogate.dual_clipped),
        "selected_fraction": mean(torch.zeros_like(mask) if inputs.selected is None else inputs.selected),
        "ratio_mean": mean(surrogate.ratio),
        "approx_kl_k1": mean(-log_ratio),
        "approx_kl_k3": mean(torch.expm1(clamped) - clamped),
        "logp_gap_mean_abs": mean(log_ratio.abs()),
        "num_tokens": num_tokens.to(dtype),
    }
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    if terms.kl is not None:
        metrics["kl_ref"] = mean(terms.kl)
    if cov is not None:
        metrics.update(_covariance_metrics(cov, mask))
    return metrics
