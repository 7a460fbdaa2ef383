"""Triton kernel of the policy losses, and the token-local formulas of terms.py as device functions for other kernels.

Sums over tokens are float64 from the first addition on: cov_mean and ess are differences and quotients of large sums,
and two dozen float64 additions a token take less time than reading the token, also on GPUs with slow float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spear_kernels.compile_check import Production
from spear_kernels.policy_loss.config import KINDS, KL_KINDS
from spear_kernels.policy_loss.metrics import METRICS, QUANTILES
from spear_kernels.ratio import MAX_LOG_RATIO

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_CLIP_COV = tl.constexpr(KINDS.index("clip_cov"))
_KL_COV = tl.constexpr(KINDS.index("kl_cov"))
_GSPO = tl.constexpr(KINDS.index("gspo"))
_CISPO = tl.constexpr(KINDS.index("cispo"))
_REINFORCE = tl.constexpr(KINDS.index("reinforce"))
_K1 = tl.constexpr(KL_KINDS.index("k1"))
_K2 = tl.constexpr(KL_KINDS.index("k2"))

# Sum of a program in slot s belongs to METRICS[s]; what has no metric of its own takes the slots of the quantiles.
_NUM_SUMS = tl.constexpr(len(METRICS) - len(QUANTILES) + 2)
_NUM_METRICS = tl.constexpr(len(METRICS))
SLOTS = 1 << (len(METRICS) - 1).bit_length()
_SLOTS = tl.constexpr(SLOTS)
_LOSS = tl.constexpr(METRICS.index("loss"))
_POLICY_LOSS = tl.constexpr(METRICS.index("policy_loss"))
_NUM_TOKENS = tl.constexpr(METRICS.index("num_tokens"))
_DROPPED = tl.constexpr(METRICS.index("dropped_tokens"))
_ESS = tl.constexpr(METRICS.index("ess"))
_COV_MEAN = tl.constexpr(METRICS.index("cov_mean"))
_CLIPPED = tl.constexpr(METRICS.index("clip_fraction"))
_CLIPPED_LOW = tl.constexpr(METRICS.index("clip_fraction_low"))
_CLIPPED_HIGH = tl.constexpr(METRICS.index("clip_fraction_high"))
_DUAL_CLIPPED = tl.constexpr(METRICS.index("dual_clip_fraction"))
_SELECTED = tl.constexpr(METRICS.index("selected_fraction"))
_RATIO = tl.constexpr(METRICS.index("ratio_mean"))
_KL_K1 = tl.constexpr(METRICS.index("approx_kl_k1"))
_KL_K3 = tl.constexpr(METRICS.index("approx_kl_k3"))
_GAP = tl.constexpr(METRICS.index("logp_gap_mean_abs"))
_ENTROPY = tl.constexpr(METRICS.index("entropy"))
_KL_REF = tl.constexpr(METRICS.index("kl_ref"))
_TIS_WEIGHT = tl.constexpr(METRICS.index("tis_weight_mean"))
_TIS_CLIPPED = tl.constexpr(METRICS.index("tis_clip_fraction"))
_ADVANTAGE = tl.constexpr(len(METRICS) - len(QUANTILES))
_LOGP = tl.constexpr(len(METRICS) - len(QUANTILES) + 1)

BLOCK = 512
"""Tokens of a program."""
CHUNK = 64
"""Programs whose sums the last one reads at once."""
NUM_WARPS = 4


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


@triton.jit
def load_float(pointer, row, active, default):
    """Float32 values of `row`, 0 where not active; `default` everywhere if there is no such tensor."""
    if pointer is None:
        return tl.full(row.shape, default, tl.float32)
    else:
        return tl.load(pointer + row, mask=active, other=0).to(tl.float32)


@triton.jit
def put_sum(sums, SLOT: tl.constexpr, values, active):
    """Store the float64 sum of the active values, numbers or flags."""
    tl.store(sums + SLOT, tl.sum(tl.where(active, values.to(tl.float64), 0.0), axis=0))


@triton.jit
def reduce_programs(sums, num_programs, CHUNK: tl.constexpr):
    """Totals [SLOTS] of the sums [num_programs, SLOTS], always added in the same order."""
    slot = tl.arange(0, _SLOTS)
    totals = tl.zeros([_SLOTS], tl.float64)
    for start in tl.range(0, num_programs, CHUNK):
        program = start + tl.arange(0, CHUNK)
        written = (program < num_programs)[:, None] & (slot < _NUM_SUMS)[None, :]
        # Other programs wrote these: bypass the first-level cache, which is not coherent between processors.
        part = tl.load(sums + program[:, None] * _SLOTS + slot[None, :], mask=written, other=0.0, cache_modifier=".cg")
        totals += tl.sum(part, axis=0)
    return totals


@triton.jit
def pick(totals, SLOT: tl.constexpr):
    """One entry of `totals` [SLOTS] as a scalar."""
    return tl.sum(tl.where(tl.arange(0, _SLOTS) == SLOT, totals, 0.0), axis=0)


@triton.jit
def write_results(totals, count, inverse, loss, metrics, scale, OWN_COUNT: tl.constexpr):
    """The loss, METRICS [M] without the quantiles, and the factor that unscaled coefficients lack."""
    num_tokens = pick(totals, _NUM_TOKENS)
    divisor = tl.where(num_tokens < 1, 1.0, num_tokens)
    factor = tl.full((), inverse, tl.float64)
    if OWN_COUNT:
        factor = factor / divisor
    if count is not None:
        given = tl.load(count).to(tl.float64)
        factor = factor / tl.where(given < 1, 1.0, given)
    means = totals / divisor
    ratio_mean = pick(means, _RATIO)
    square_mean = pick(means, _ESS)
    ess = tl.where(num_tokens < 1, 0.0, ratio_mean * ratio_mean / tl.where(num_tokens < 1, 1.0, square_mean))
    cov_mean = pick(means, _COV_MEAN) - pick(means, _ADVANTAGE) * pick(means, _LOGP)
    slot = tl.arange(0, _SLOTS)
    values = tl.where((slot == _LOSS) | (slot == _POLICY_LOSS), totals * factor, means)
    values = tl.where((slot == _NUM_TOKENS) | (slot == _DROPPED), totals, values)
    values = tl.where(slot == _ESS, ess, tl.where(slot == _COV_MEAN, cov_mean, values))
    values = tl.where(slot < _ADVANTAGE, values, 0.0)
    tl.store(metrics + slot, values.to(tl.float32), mask=slot < _NUM_METRICS)
    tl.store(loss, (pick(totals, _LOSS) * factor).to(tl.float32))
    tl.store(scale, factor.to(tl.float32))


@triton.jit
def put_ratio_sums(sums, logp, old_logp, ratio, active):
    """Sums of what the ratio and the log-ratio of each token give."""
    log_ratio = logp - old_logp
    put_sum(sums, _RATIO, ratio, active)
    put_sum(sums, _ESS, ratio.to(tl.float64) * ratio, active)
    put_sum(sums, _KL_K1, -log_ratio, active)
    put_sum(sums, _KL_K3, exp_excess(bounded(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)), active)
    put_sum(sums, _GAP, tl.abs(log_ratio), active)


@triton.jit
def put_covariance_sums(sums, logp, advantage, active):
    """Sums that give mean((A - mean A)(logp - mean logp)) = mean(A logp) - mean A mean logp."""
    put_sum(sums, _COV_MEAN, advantage.to(tl.float64) * logp, active)
    put_sum(sums, _ADVANTAGE, advantage, active)
    put_sum(sums, _LOGP, logp, active)


@triton.jit
def put_flag_sums(sums, clipped_low, clipped_high, dual_clipped, chosen, active, KIND: tl.constexpr):
    """Counts of clipped and chosen tokens."""
    put_sum(sums, _CLIPPED, clipped_low | clipped_high, active)
    put_sum(sums, _CLIPPED_LOW, clipped_low, active)
    put_sum(sums, _CLIPPED_HIGH, clipped_high, active)
    put_sum(sums, _DUAL_CLIPPED, dual_clipped, active)
    put_sum(sums, _SELECTED, chosen, active)
    put_sum(sums, _DROPPED, chosen & (KIND == _CLIP_COV), active)


@triton.jit
def sampler_weighted(weight, sums, old_logp, sampler_logp_in, tis_cap, row, active):
    """`weight` times the truncated importance weight, whose sums are stored; `weight` if there is no sampler."""
    importance = tl.full(row.shape, 0.0, tl.float32)
    truncated = row < 0
    if sampler_logp_in is not None:
        gap = old_logp - load_float(sampler_logp_in, row, active, 0.0)
        importance = tl.exp(bounded(gap, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
        truncated = importance > tis_cap
        importance = tl.where(truncated, tis_cap, importance)
        weight = weight * importance
    put_sum(sums, _TIS_WEIGHT, importance, active)
    put_sum(sums, _TIS_CLIPPED, truncated, active)
    return weight


_POINTERS = (
    *("logp_in", "old_logp_in", "advantages_in", "mask_in", "row_weight_in", "ref_logp_in", "entropy_in"),
    *("selected_in", "sampler_logp_in", "sequence_ratio_in", "lengths_in", "count", "d_logp_out", "d_entropy_out"),
    *("loss", "metrics", "scale", "sums", "finished"),
)


# Not on alignment: slices of per-token tensors start anywhere, and each combination would be compiled.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_POINTERS)
def policy_loss_kernel(
    logp_in,
    old_logp_in,
    advantages_in,
    mask_in,
    row_weight_in,
    ref_logp_in,
    entropy_in,
    selected_in,
    sampler_logp_in,
    sequence_ratio_in,
    lengths_in,
    count,
    d_logp_out,
    d_entropy_out,
    loss,
    metrics,
    scale,
    sums,
    finished,
    num_rows,
    inverse,
    clip_low,
    clip_high,
    dual_clip,
    kl_cov_coef,
    kl_coef,
    entropy_coef,
    tis_cap,
    KIND: tl.constexpr,
    KL_KIND: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    OWN_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Coefficients of BLOCK tokens, and by the program that finishes last the loss and the metrics.

    Inputs [N] of any float type, or None: lengths_in int64 weights a token by 1/length; mask_in, selected_in bool. The
    loss is multiplied by `inverse` and divided by the number of active tokens (OWN_COUNT) or by `count`, 0-d.
    d_logp_out, d_entropy_out float32 [N] lack `scale`. sums float64 [programs, SLOTS] is scratch; finished int32 [1]
    must hold 0.
    """
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    active = inside & tl.load(mask_in + row, mask=inside, other=0)
    logp = load_float(logp_in, row, active, 0.0)
    old_logp = load_float(old_logp_in, row, active, 0.0)
    advantage = load_float(advantages_in, row, active, 0.0)
    weight = load_float(row_weight_in, row, active, 1.0)
    ref_logp = load_float(ref_logp_in, row, active, 0.0)
    sequence_ratio = load_float(sequence_ratio_in, row, active, 1.0)
    chosen = active & (row < 0)
    if selected_in is not None:
        chosen = tl.load(selected_in + row, mask=active, other=0)
    sums += program.to(tl.int64) * _SLOTS
    weight = sampler_weighted(weight, sums, old_logp, sampler_logp_in, tis_cap, row, active)
    policy, kl, d_logp, ratio, clipped_low, clipped_high, dual_clipped = token_terms(
        logp,
        old_logp,
        advantage,
        weight,
        ref_logp,
        chosen,
        sequence_ratio,
        clip_low,
        clip_high,
        dual_clip,
        kl_cov_coef,
        kl_coef,
        KIND,
        KL_KIND,
        HAS_DUAL_CLIP,
        ref_logp_in is not None,
    )
    share = tl.where(active, 1.0, 0.0)
    if lengths_in is not None:
        share = tl.where(active, 1.0 / tl.load(lengths_in + row, mask=active, other=1).to(tl.float32), 0.0)
    tl.store(d_logp_out + row, tl.where(active, d_logp * share, 0.0), mask=inside)
    total = policy.to(tl.float64)
    if ref_logp_in is not None:
        total += kl_coef * kl
    entropy = load_float(entropy_in, row, active, 0.0)
    if d_entropy_out is not None:
        total -= entropy_coef * entropy
        tl.store(d_entropy_out + row, -entropy_coef * share, mask=inside)
    put_sum(sums, _LOSS, total * share, active)
    put_sum(sums, _POLICY_LOSS, policy.to(tl.float64) * share, active)
    put_sum(sums, _NUM_TOKENS, tl.where(active, 1.0, 0.0), active)
    put_flag_sums(sums, clipped_low, clipped_high, dual_clipped, chosen, active, KIND)
    put_ratio_sums(sums, logp, old_logp, ratio, active)
    put_covariance_sums(sums, logp, advantage, active)
    put_sum(sums, _ENTROPY, entropy, active)
    put_sum(sums, _KL_REF, kl, active)
    # The barrier orders the stores of all warps before the counter, which publishes them to the last program.
    tl.debug_barrier()
    ticket = tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        totals = reduce_programs(sums - program.to(tl.int64) * _SLOTS, tl.num_programs(0), CHUNK)
        write_results(totals, count, inverse, loss, metrics, scale, OWN_COUNT)


_FLAGS = ("mask_in", "selected_in")
_TYPES = dict.fromkeys(_POINTERS, "*fp32") | dict.fromkeys(_FLAGS, "*i1")
_TYPES |= {"lengths_in": "*i64", "count": "*i64", "sums": "*fp64", "finished": "*i32"}
_NUMBERS = ("inverse", "clip_low", "clip_high", "dual_clip", "kl_cov_coef", "kl_coef", "entropy_coef", "tis_cap")


def _production(name: str, kind: str, absent: tuple[str, ...], max_registers: int) -> Production:
    """The launch of `kind` without the tensors `absent`."""
    present = {key: value for key, value in _TYPES.items() if key not in absent}
    constants = {
        "KIND": KINDS.index(kind),
        "KL_KIND": KL_KINDS.index("k3"),
        "HAS_DUAL_CLIP": True,
        "OWN_COUNT": "count" in absent,
        "BLOCK": BLOCK,
        "CHUNK": CHUNK,
    }
    return Production(
        name,
        policy_loss_kernel,
        {**present, "num_rows": "i32", **dict.fromkeys(_NUMBERS, "fp32")},
        {**dict.fromkeys(absent), **constants},
        NUM_WARPS,
        3,
        max_registers,
        0,
        2048,
    )


_TOKEN_ONLY = ("sequence_ratio_in", "lengths_in")
_PLAIN = (*_TOKEN_ONLY, "row_weight_in", "ref_logp_in", "selected_in", "sampler_logp_in", "count", "d_entropy_out")
PRODUCTION = (
    _production("policy_loss-ppo-plain", "ppo", _PLAIN, 144),
    _production("policy_loss-clip_cov-all-terms", "clip_cov", _TOKEN_ONLY, 144),
    _production("policy_loss-kl_cov-all-terms", "kl_cov", _TOKEN_ONLY, 144),
    _production("policy_loss-gspo-all-terms", "gspo", (), 144),
    # Triton 3.6 needs 148 on sm_80, 3.7 142: four warps have room for 255 and a launch has few programs.
    _production("policy_loss-cispo-all-terms", "cispo", _TOKEN_ONLY, 152),
)
