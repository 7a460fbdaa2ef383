"""Triton device code of the policy losses: the token-local formulas of terms.py on scalars or blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from spear_kernels.policy_loss.config import KINDS, KL_KINDS
from spear_kernels.ratio import MAX_LOG_RATIO

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_CLIP_COV = tl.constexpr(KINDS.index("clip_cov"))
_KL_COV = tl.constexpr(KINDS.index("kl_cov"))
_GSPO = tl.constexpr(KINDS.index("gspo"))
_CISPO = tl.constexpr(KINDS.index("cispo"))
_REINFORCE = tl.constexpr(KINDS.index("reinforce"))
_K1 = tl.constexpr(KL_KINDS.index("k1"))
_K2 = tl.constexpr(KL_KINDS.index("k2"))


@triton.jit
def bounded(x, low, high):
    """clamp(x, low, high) that passes NaN on, which tl.minimum and tl.maximum would hide."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def in_range(log_ratio, slope):
    """The slope where the clamp of a log-ratio leaves it alone, 0 beyond; NaN keeps its slope."""
    return tl.where((log_ratio < -_MAX_LOG_RATIO) | (log_ratio > _MAX_LOG_RATIO), 0.0, slope)


@triton.jit
def exp_excess(x):
    """exp(x) - 1 - x, by its series near 0, where the difference would cancel; error below 8e-7 of the value."""
    tail = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * tail)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1 - x)


@triton.jit
def reference_kl(logp, ref_logp, KL_KIND: tl.constexpr):
    """Value and slope in logp of the estimators k1, k2, k3 of KL(policy || reference)."""
    raw = logp - ref_logp
    d = bounded(raw, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if KL_KIND == _K1:
        return d, in_range(raw, 1.0)
    elif KL_KIND == _K2:
        return d * d * 0.5, in_range(raw, d)
    else:
        excess = exp_excess(-d)
        expm1 = tl.where(tl.abs(d) < 0.5, excess - d, tl.exp(-d) - 1)
        return excess, in_range(raw, -expm1)


@triton.jit
def clipped_surrogate(
    ratio, slope, advantage, selected, clip_low, clip_high, dual_clip, KIND: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr
):
    """max(-A ratio, -A clip(ratio)), the dual clip, and Clip-Cov's zeros; slope is d ratio / d logp."""
    low = (advantage < 0) & (ratio < 1 - clip_low)
    high = (advantage > 0) & (ratio > 1 + clip_high)
    flat = low | high
    value = -advantage * tl.where(flat, bounded(ratio, 1 - clip_low, 1 + clip_high), ratio)
    dual = ratio < 0
    if HAS_DUAL_CLIP:
        bound = -advantage * dual_clip
        dual = (advantage < 0) & (value > bound)
        value = tl.where(dual, bound, value)
        flat = flat | dual
    if KIND == _CLIP_COV:
        value = tl.where(selected, 0.0, value)
        flat = flat | selected
    return value, tl.where(flat, 0.0, -advantage * slope), low, high, dual


@triton.jit
def surrogate(
    logp,
    log_ratio,
    ratio,
    slope,
    advantage,
    selected,
    clip_low,
    clip_high,
    dual_clip,
    kl_cov_coef,
    KIND: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
):
    """Value, slope in logp, and the three clip flags of the policy term, before row_weight."""
    never = ratio < 0
    if KIND == _KL_COV:
        penalty = tl.where(selected, kl_cov_coef, 0.0)
        sign = tl.where(log_ratio > 0, 1.0, 0.0) - tl.where(log_ratio < 0, 1.0, 0.0)
        value = -advantage * ratio + penalty * tl.abs(log_ratio)
        return value, -advantage * slope + penalty * sign, never, never, never
    elif KIND == _CISPO:
        weight = -advantage * bounded(ratio, 1 - clip_low, 1 + clip_high)
        return weight * logp, weight, ratio < 1 - clip_low, ratio > 1 + clip_high, never
    elif KIND == _REINFORCE:
        return -advantage * logp, -advantage, never, never, never
    else:
        return clipped_surrogate(ratio, slope, advantage, selected, clip_low, clip_high, dual_clip, KIND, HAS_DUAL_CLIP)


@triton.jit
def token_terms(
    logp,
    old_logp,
    advantage,
    row_weight,
    ref_logp,
    selected,
    sequence_ratio,
    clip_low,
    clip_high,
    dual_clip,
    kl_cov_coef,
    kl_coef,
    KIND: tl.constexpr,
    KL_KIND: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    """The terms of each token before aggregation, element-wise on scalars or blocks of one shape.

    All arguments float32 but `selected` (int1); masked rows must hold finite numbers. sequence_ratio is read for gspo,
    ref_logp if HAS_REF, dual_clip if HAS_DUAL_CLIP; pass anything of the right shape otherwise. KIND and KL_KIND are
    indices in KINDS and KL_KINDS. policy is row_weight * surrogate, kl the unweighted estimate (0 without HAS_REF),
    d_logp the derivative of policy + kl_coef * kl.
    """
    log_ratio = logp - old_logp
    if KIND == _GSPO:
        ratio = sequence_ratio
        slope = sequence_ratio
    else:
        clamped = bounded(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        ratio = tl.exp(clamped)
        slope = in_range(log_ratio, ratio)
    value, d_logp, clipped_low, clipped_high, dual_clipped = surrogate(  # pyright: ignore[reportGeneralTypeIssues]
        logp,
        log_ratio,
        ratio,
        slope,
        advantage,
        selected,
        clip_low,
        clip_high,
        dual_clip,
        kl_cov_coef,
        KIND,
        HAS_DUAL_CLIP,
    )
    policy = value * row_weight
    d_logp = d_logp * row_weight
    kl = ratio * 0.0
    if HAS_REF:
        kl, d_kl = reference_kl(logp, ref_logp, KL_KIND)
        d_logp += kl_coef * d_kl
    return policy, kl, d_logp, ratio, clipped_low, clipped_high, dual_clipped
