"""`policy_loss`: loss and metrics from log-probabilities; the gradient is computed with the value, without autograd."""

from __future__ import annotations

import torch

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import require_shape
from spear_kernels.cov_select.op import all_rows
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.inputs import Count, PolicyBatch
from spear_kernels.policy_loss.library import policy_loss_operator
from spear_kernels.policy_loss.metrics import named_metrics
from spear_kernels.results import PolicyLossResult


def _metrics_of(
    vector: torch.Tensor, entropy: torch.Tensor | None, batch: PolicyBatch, has_quantiles: bool
) -> dict[str, torch.Tensor]:
    return named_metrics(
        vector,
        has_entropy=entropy is not None,
        has_ref=batch.ref_logp is not None,
        has_sampler=batch.sampler_logp is not None,
        has_quantiles=has_quantiles,
    )


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
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
    sampler_logp: torch.Tensor | None = None,
    backend: str = "auto",
) -> PolicyLossResult:
    """The loss of packed action tokens, differentiable in `logp` and `entropy`, and its metrics.

    loss = sum over tokens of w * (row_weight * tis * surrogate + kl_coef * KL - entropy_coef * entropy), where w is the
    aggregation's weight. logp, old_logp, advantages, entropy, ref_logp, row_weight [N] float, in nats where
    log-probs; mask bool [N] marks action tokens (None: all are), other rows are ignored even if NaN; seq_ids int64 [N]
    in any order. row_weight multiplies the surrogate only and does not change any denominator. With sampler_logp [N],
    the log-probs the sampler reported, tis = min(exp(clamp(old_logp - sampler_logp, +-20)), tis_cap), a constant
    (`truncated_importance`); else 1. Computed in float32 (float64 for float64 logp). A batch without action tokens
    gives loss 0 with zero gradients. Tensors on another device than logp are copied to it without waiting.

    Clip-Cov and KL-Cov choose their tokens with `covariance_select(..., seed, positions)` from this call's rows, unless
    `selected` bool [N] holds a choice made over a larger batch. num_tokens and num_seqs (numbers or 0-d tensors) are
    the denominators of that larger batch: then the losses of its parts add up to its loss. A part must hold whole
    sequences for "gspo" and "seq-mean-token-mean".

    backend "triton" computes everything in one launch (and a 4-byte fill) when `selected` is given or not needed. The
    choice of tokens, and what depends on whole sequences, comes from sorts before it: the ratio of "gspo", the lengths
    of "seq-mean-token-mean", and num_seqs of every "seq-mean-*" when it is not given.

    Metrics are detached 0-d tensors; `join_metrics` combines those of several calls by these rules. `num_tokens` and
    `dropped_tokens` (those whose surrogate Clip-Cov zeroed) add up, and so do `loss` and `policy_loss`, which share
    the loss's denominators. Means over this call's action tokens combine weighted by num_tokens: clip_fraction,
    clip_fraction_low, clip_fraction_high, dual_clip_fraction, selected_fraction, ratio_mean, approx_kl_k1,
    approx_kl_k3, logp_gap_mean_abs, entropy and kl_ref if given, tis_weight_mean and tis_clip_fraction with
    sampler_logp. `ess`, the effective sample size of the ratios as a share of the tokens, (sum r)^2 / (n sum r^2),
    combines through sum r = n ratio_mean and sum r^2 = n ratio_mean^2 / ess. `cov_mean`, and cov_p50, cov_p99 and
    cov_max, present when the choice was made here, describe the call alone.

    Raises:
        ValueError: wrong shape, an argument that `cfg` needs is missing, tis_cap without sampler_logp or the reverse,
            or a backend that is not available.
    """
    backend = resolve_backend(backend, logp)
    require_shape("logp", logp, (logp.numel(),))
    require_shape("entropy", entropy, tuple(logp.shape))
    batch = PolicyBatch(
        old_logp,
        advantages,
        all_rows(mask, logp),
        seq_ids,
        ref_logp,
        row_weight,
        positions,
        selected,
        num_tokens,
        num_seqs,
        seed,
        sampler_logp,
    ).check(logp.shape[0], cfg, entropy is not None, logp.device)
    loss, vector = policy_loss_operator(logp, entropy, batch, cfg, backend)
    has_quantiles = cfg.uses_covariance and selected is None
    return PolicyLossResult(loss, _metrics_of(vector, entropy, batch, has_quantiles))
