"""`policy_loss`: loss and metrics from log-probabilities; the gradient is computed with the value, without autograd."""

from __future__ import annotations

import torch

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import compute_dtype, require_shape
from spear_kernels.gradient import attach_gradient
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import Count, PolicyBatch, TokenInputs, sequence_lengths
from spear_kernels.policy_loss.metrics import policy_metrics
from spear_kernels.policy_loss.terms import TokenTerms, aggregate, token_terms
from spear_kernels.results import PolicyLossResult
from spear_kernels.segment_reduce import segment_sum

GSPO_MAX_LOG_RATIO = 10.0
"""GSPO caps the mean log-ratio of a sequence here, in nats."""


def gspo_ratio(logp: torch.Tensor, batch: PolicyBatch, inputs: TokenInputs) -> torch.Tensor:
    """exp(min(mean over the sequence's action tokens of (logp - old_logp), 10)), [N]."""
    index, lengths = sequence_lengths(batch)
    totals = segment_sum(torch.where(inputs.mask, logp - inputs.old_logp, 0), index)
    return (totals / lengths.clamp(min=1))[index].clamp(max=GSPO_MAX_LOG_RATIO).exp()


def loss_and_terms(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    batch: PolicyBatch,
    cfg: PolicyLossConfig,
    cov: torch.Tensor | None,
) -> tuple[PolicyLossResult, TokenTerms]:
    """Loss (a constant), metrics and per-token coefficients for detached logp and entropy [N].

    `batch` and `cov` come from `PolicyBatch.with_selection`.
    """
    inputs = TokenInputs.of(batch, cfg, logp.dtype)
    sequence_ratio = gspo_ratio(logp, batch, inputs) if cfg.kind == "gspo" else None
    terms = token_terms(logp, inputs, cfg, sequence_ratio)
    loss, policy = aggregate(terms, entropy, inputs, cfg)
    metrics = policy_metrics(logp, entropy, inputs, terms, cov)
    return PolicyLossResult(loss, {"loss": loss, "policy_loss": policy, **metrics}), terms


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    seed: int = 0,
    *,
    positions: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    num_tokens: Count | None = None,
    num_seqs: Count | None = None,
    backend: str = "auto",
) -> PolicyLossResult:
    """The loss of packed action tokens, differentiable in `logp` and `entropy`, and its metrics.

    loss = sum over tokens of w * (row_weight * surrogate + kl_coef * KL - entropy_coef * entropy), where w is the
    aggregation's weight. logp, old_logp, advantages, entropy, ref_logp, row_weight [N] float, in nats where
    log-probs; mask bool [N] marks action tokens, other rows are ignored even if NaN; seq_ids int64 [N] in any order.
    row_weight multiplies the surrogate only and does not change any denominator. Computed in float32 (float64 for
    float64 logp). A batch without action tokens gives loss 0 with zero gradients.

    Clip-Cov and KL-Cov choose their tokens with `covariance_select(..., seed, positions)` from this call's rows, unless
    `selected` bool [N] holds a choice made over a larger batch. num_tokens and num_seqs (numbers or 0-d tensors) are
    the denominators of that larger batch: then the losses of its parts add up to its loss. A part must hold whole
    sequences for "gspo" and "seq-mean-token-mean".

    Metrics are detached 0-d tensors. `loss` and `policy_loss` share the loss's denominators, so parts add up; all
    others are means over this call's action tokens and combine weighted by `num_tokens` (cov_p50, cov_p99 and
    cov_max, present when the choice was made here, describe the call alone).

    Raises:
        ValueError: wrong shape, an argument that `cfg` needs is missing, or a backend that is not available.
    """
    resolve_backend(backend)
    require_shape("logp", logp, (logp.numel(),))
    require_shape("entropy", entropy, tuple(logp.shape))
    batch = PolicyBatch(
        old_logp, advantages, mask, seq_ids, ref_logp, row_weight, positions, selected, num_tokens, num_seqs, seed
    ).check(len(logp), cfg, entropy is not None)
    dtype = compute_dtype(logp)
    fixed_entropy = None if entropy is None else entropy.detach().to(dtype)
    fixed_logp = logp.detach().to(dtype)
    with torch.no_grad():
        batch, cov = batch.with_selection(fixed_logp, cfg)
        result, terms = loss_and_terms(fixed_logp, fixed_entropy, batch, cfg, cov)
    loss = attach_gradient(result.loss, (logp, entropy), (terms.d_logp, terms.d_entropy))
    return PolicyLossResult(loss, result.metrics)
