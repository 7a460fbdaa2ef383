"""Loss, metrics and per-token coefficients for detached log-probs, by the backend asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spear_kernels.checks import compute_dtype
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import PolicyBatch, TokenInputs, sequence_lengths
from spear_kernels.policy_loss.metrics import metric_vector
from spear_kernels.policy_loss.terms import TokenTerms, aggregate, token_terms
from spear_kernels.segment_reduce import segment_sum

GSPO_MAX_LOG_RATIO = 10.0
"""GSPO caps the mean log-ratio of a sequence here, in nats."""


class Evaluation(NamedTuple):
    """What `policy_loss` needs of one pass, float32 or float64; the gradient is coefficient * scale."""

    loss: torch.Tensor  # 0-d
    metrics: torch.Tensor  # METRICS [M]
    d_logp: torch.Tensor  # [N]
    d_entropy: torch.Tensor  # [N], or [0] when entropy_coef is 0
    scale: torch.Tensor  # 0-d


def gspo_ratio(logp: torch.Tensor, batch: PolicyBatch) -> torch.Tensor:
    """exp(min(mean over the sequence's action tokens of (logp - old_logp), 10)), [N]."""
    index, lengths = sequence_lengths(batch)
    totals = segment_sum(torch.where(batch.mask, logp - batch.old_logp.to(logp.dtype), 0), index)
    return (totals / lengths.clamp(min=1))[index].clamp(max=GSPO_MAX_LOG_RATIO).exp()


def torch_evaluation(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    batch: PolicyBatch,
    cfg: PolicyLossConfig,
    cov: torch.Tensor | None,
) -> tuple[torch.Tensor, TokenTerms]:
    """METRICS [M], the loss first, and the terms; `batch` and `cov` come from `PolicyBatch.with_selection`."""
    inputs = TokenInputs.of(batch, cfg, logp.dtype)
    terms = token_terms(logp, inputs, cfg, gspo_ratio(logp, batch) if cfg.kind == "gspo" else None)
    loss, policy = aggregate(terms, entropy, inputs, cfg)
    return metric_vector(loss, policy, logp, entropy, inputs, terms, cfg, cov), terms


def evaluate(
    logp: torch.Tensor, entropy: torch.Tensor | None, batch: PolicyBatch, cfg: PolicyLossConfig, backend: str
) -> Evaluation:
    """One pass over a checked batch by "torch" or "triton"; chooses tokens by covariance first where needed."""
    dtype = compute_dtype(logp)
    batch, cov = batch.with_selection(logp.to(dtype), cfg)
    if backend == "triton":
        from spear_kernels.policy_loss.launch import triton_evaluation

        return triton_evaluation(logp, entropy, batch, cfg, cov)
    entropy = None if entropy is None else entropy.to(dtype)
    metrics, terms = torch_evaluation(logp.to(dtype), entropy, batch, cfg, cov)
    d_entropy = metrics.new_empty(0) if terms.d_entropy is None else terms.d_entropy
    return Evaluation(metrics[0].clone(), metrics, terms.d_logp, d_entropy, metrics.new_ones(()))
