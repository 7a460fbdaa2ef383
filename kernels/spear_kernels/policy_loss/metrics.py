"""What a policy loss reports: one vector of detached numbers, and which of them a call has."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spear_kernels.cov_select import summarize_covariance
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.policy_loss.terms import TokenTerms
from spear_kernels.ratio import clamp_log_ratio

METRICS = (
    "loss",
    "policy_loss",
    "num_tokens",
    "dropped_tokens",
    "ess",
    "cov_mean",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "selected_fraction",
    "ratio_mean",
    "approx_kl_k1",
    "approx_kl_k3",
    "logp_gap_mean_abs",
    "entropy",
    "kl_ref",
    "tis_weight_mean",
    "tis_clip_fraction",
    "cov_p50",
    "cov_p99",
    "cov_max",
)
"""Order of the vector [M]; a call that lacks what a metric describes holds 0 in its place."""
QUANTILES = METRICS[-3:]
"""Metrics that exist when the tokens were chosen in the call; the choice computes what they need."""

SUMS = ("loss", "policy_loss", "num_tokens", "dropped_tokens")
"""Metrics whose values of parts of a batch add up."""


def join_metrics(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Metrics of a batch from those of its parts, 0-d each, without waiting for the device.

    SUMS add up, `ess` is taken from the sums of the ratios and of their squares, others are weighted by num_tokens.
    Statistics of the covariance cannot be joined: they are left out unless there is one part.
    """
    if len(parts) == 1:
        return dict(parts[0])
    names = [name for name in parts[0] if not name.startswith("cov_")]
    table = torch.stack([torch.stack([part[name] for name in names]) for part in parts])  # [parts, names]
    tokens, ratio, ess = (table[:, names.index(name)] for name in ("num_tokens", "ratio_mean", "ess"))
    # A sum of products and no matrix product, which autocast would round.
    means = (tokens[:, None] * table).sum(0) / tokens.sum().clamp(min=1)
    joined = zip(names, table.sum(0).unbind(), means.unbind(), strict=True)
    result = {name: total if name in SUMS else mean for name, total, mean in joined}
    square_mean = (tokens * torch.where(tokens > 0, ratio.square() / ess, 0)).sum() / tokens.sum()
    result["ess"] = torch.where(tokens.sum() > 0, result["ratio_mean"].square() / square_mean, 0)
    return result


def named_metrics(
    vector: torch.Tensor, *, has_entropy: bool, has_ref: bool, has_sampler: bool, has_quantiles: bool
) -> dict[str, torch.Tensor]:
    """The metrics that a call has, 0-d each, from its vector [M]."""
    absent: list[str] = []
    absent += [] if has_entropy else ["entropy"]
    absent += [] if has_ref else ["kl_ref"]
    absent += [] if has_sampler else ["tis_weight_mean", "tis_clip_fraction"]
    absent += [] if has_quantiles else QUANTILES
    return {name: value for name, value in zip(METRICS, vector.unbind(), strict=True) if name not in absent}


def covariance_quantiles(cov: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """QUANTILES [3] of cov float64 [N] over the action tokens."""
    summary = summarize_covariance(cov, mask)
    return torch.stack([summary[name] for name in QUANTILES]).to(dtype)


def _covariance(logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A - mean A)(logp - mean logp), float64 [N], to be averaged; unlike `covariance`, its bits depend on order."""
    num_tokens = mask.sum().clamp(min=1)
    advantages, logp = (torch.where(mask, values, 0).double() for values in (advantages, logp))
    return (advantages - advantages.sum() / num_tokens) * (logp - logp.sum() / num_tokens)


def _effective_share(ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(sum r)^2 / (n sum r^2) over the action tokens: 1 for equal ratios, 1/n if one outweighs all, 0 for none."""
    num_tokens = mask.sum().clamp(min=1)
    ratio = torch.where(mask, ratio, 0)
    mean_square = ratio.square().sum() / num_tokens
    return torch.where(mask.any(), (ratio.sum() / num_tokens).square() / mean_square, 0)


def metric_vector(
    loss: torch.Tensor,
    policy: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: TokenInputs,
    terms: TokenTerms,
    cfg: PolicyLossConfig,
    cov: torch.Tensor | None,
) -> torch.Tensor:
    """METRICS [M] of detached per-token quantities [N] and the loss with its policy part, 0-d."""
    mask, dtype = inputs.mask, inputs.old_logp.dtype
    surrogate = terms.surrogate
    log_ratio = torch.where(mask, logp, 0) - inputs.old_logp
    clamped, _ = clamp_log_ratio(log_ratio)
    means = {
        "cov_mean": _covariance(logp, inputs.advantages, mask),
        "clip_fraction": surrogate.clipped_low | surrogate.clipped_high,
        "clip_fraction_low": surrogate.clipped_low,
        "clip_fraction_high": surrogate.clipped_high,
        "dual_clip_fraction": surrogate.dual_clipped,
        "selected_fraction": inputs.selected,
        "ratio_mean": surrogate.ratio,
        "approx_kl_k1": -log_ratio,
        "approx_kl_k3": torch.expm1(clamped) - clamped,
        "logp_gap_mean_abs": log_ratio.abs(),
        "entropy": entropy,
        "kl_ref": terms.kl,
        "tis_weight_mean": inputs.tis_weight,
        "tis_clip_fraction": inputs.tis_clipped,
    }
    num_tokens, nothing = mask.sum(), loss.new_zeros(())
    divisor = num_tokens.clamp(min=1)
    totals = {name: _total(tokens, mask, dtype) for name, tokens in means.items() if tokens is not None}
    values = {name: totals[name] / divisor if name in totals else nothing for name in means}
    values["num_tokens"] = num_tokens.to(dtype)
    values["dropped_tokens"] = totals.get("selected_fraction", nothing) if cfg.kind == "clip_cov" else nothing
    values["ess"] = _effective_share(surrogate.ratio, mask)
    values["loss"], values["policy_loss"] = loss, policy
    head = torch.stack([values[name] for name in METRICS if name not in QUANTILES])
    tail = head.new_zeros(len(QUANTILES)) if cov is None else covariance_quantiles(cov, mask, dtype)
    return torch.cat([head, tail])


def _total(tokens: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0-d sum of `tokens` [N], numbers or flags, over the action tokens."""
    return (tokens & mask if tokens.dtype == torch.bool else torch.where(mask, tokens, 0)).sum().to(dtype)
