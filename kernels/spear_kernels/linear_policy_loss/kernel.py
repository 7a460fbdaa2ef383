"""Triton kernel of `linear_policy_loss`: statistics, loss derivatives and gradient of one row of logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spear_kernels.compile_check import Production
from spear_kernels.policy_loss.config import KINDS, KL_KINDS
from spear_kernels.policy_loss.kernel import token_terms
from spear_kernels.tile import (
    LOG2_E,
    finish_statistics,
    finite_peak,
    gradient_coefficients,
    inverse_temperature,
    row_launch,
    row_softmax,
    row_start,
    target_logit,
    write_gradient,
    write_zeros,
)


@triton.jit
def optional(pointer, row, default):
    """float32 value of a row, or `default` if the pointer is None."""
    value = default
    if pointer is not None:
        value = tl.load(pointer + row).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["num_rows", "stride", "out_stride"])
def sweep_kernel(
    logits,  # [n, >= vocab_size]
    ids,  # int64 [n]
    temperature,  # float32 [n] or None
    old_logp,  # float32 [n]
    advantages,  # float32 [n]
    aggregation_weight,  # float32 [n]
    row_weight,  # float32 [n] or None
    ref_logp,  # float32 [n] or None
    selected,  # uint8 [n] or None
    statistics,  # float32 [4, n]
    d_logp,  # float32 [n]
    d_entropy,  # float32 [n]
    out,  # [n, width] or None
    temperature_value,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    kl_cov_coef,
    kl_coef,
    entropy_coef,
    num_rows,
    stride,
    out_stride,
    vocab_size,
    width,
    KIND: tl.constexpr,
    KL_KIND: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read a row for its statistics, derive its coefficients, read it again and write its gradient."""
    row = tl.program_id(0)
    weight = tl.load(aggregation_weight + row)
    logp = 0.0
    entropy = 0.0
    peak = 0.0
    log_total = 0.0
    inverse = 1.0
    token_slope = 0.0
    entropy_slope = 0.0
    start = row_start(logits, row, stride, ALIGNED)
    token = tl.load(ids + row)
    # Masked rows may hold anything, so they are not even read.
    if weight != 0:
        inverse = inverse_temperature(temperature, temperature_value, row)
        target = target_logit(start, token, vocab_size, softcap, HAS_SOFTCAP)
        peak, total, weighted = row_softmax(
            start, vocab_size, inverse * LOG2_E, softcap, HAS_SOFTCAP, BLOCK, WIDTH, STAGES
        )
        logp, entropy, log_total = finish_statistics(target, peak, total, weighted, inverse)
        _, _, slope, _, _, _, _ = token_terms(
            logp,
            tl.load(old_logp + row),
            tl.load(advantages + row),
            optional(row_weight, row, 1.0),
            optional(ref_logp, row, 0.0),
            optional(selected, row, 0.0) != 0,
            0.0,
            clip_low,
            clip_high,
            dual_clip,
            kl_cov_coef,
            kl_coef,
            KIND,
            KL_KIND,
            HAS_DUAL_CLIP,
            ref_logp is not None,
        )
        token_slope = slope * weight
        entropy_slope = -entropy_coef * weight
    step = tl.cast(num_rows, tl.int64)
    tl.store(statistics + row, logp)
    tl.store(statistics + row + step, entropy)
    tl.store(statistics + row + 2 * step, peak * inverse)
    tl.store(statistics + row + 3 * step, log_total)
    tl.store(d_logp + row, token_slope)
    tl.store(d_entropy + row, entropy_slope)
    if out is not None:
        out_start = row_start(out, row, out_stride, ALIGNED)
        if ((token_slope == 0) & (entropy_slope == 0)) | (peak == float("-inf")):
            write_zeros(out_start, width, BLOCK, WIDTH)
        else:
            offset, bend, hot = gradient_coefficients(token_slope, entropy_slope, entropy, log_total, inverse)
            write_gradient(
                start,
                out_start,
                token,
                vocab_size,
                width,
                softcap,
                1.0,
                finite_peak(peak),
                inverse * LOG2_E,
                offset,
                bend,
                hot,
                HAS_SOFTCAP,
                HAS_ENTROPY,
                BLOCK,
                WIDTH,
                STAGES,
            )


def _production(name: str, logits: str, out: str | None, absent: tuple[str, ...] = (), **changes: Any) -> Production:
    """A launch on `logits` with 152064 columns and a gradient of type `out`; the arguments in `absent` are None."""
    launch = row_launch(152064, {"fp32": 4, "bf16": 2}[logits], passes=1 if out is None else 2)
    types = {"logits": f"*{logits}:16", "out": f"*{out}:16", "ids": "*i64:16", "selected": "*u8:16"}
    types |= {"vocab_size": "i32:16", "width": "i32:16"}
    types |= dict.fromkeys(("num_rows", "stride", "out_stride"), "i32")
    numbers = ("temperature_value", "softcap", "clip_low", "clip_high", "dual_clip", "kl_cov_coef", "kl_coef")
    types |= dict.fromkeys((*numbers, "entropy_coef"), "fp32")
    constants = {"KIND": KINDS.index("clip_cov"), "KL_KIND": KL_KINDS.index("k3"), "HAS_DUAL_CLIP": True}
    constants |= {"HAS_ENTROPY": True, "HAS_SOFTCAP": False, "ALIGNED": True, **launch.constants}
    constants |= dict.fromkeys(absent) | changes
    names = sweep_kernel.arg_names
    signature = {key: types.get(key, "*fp32:16") for key in names if key not in constants}
    return Production(name, sweep_kernel, signature, constants, launch.num_warps, 3, 64, 0, 128 << 10)


_MINIMAL = ("temperature", "row_weight", "ref_logp", "selected")

PRODUCTION = (
    _production("sweep_fp32_to_bf16", "fp32", "bf16"),
    _production("sweep_bf16_in_place", "bf16", "bf16", _MINIMAL, KIND=KINDS.index("ppo"), HAS_ENTROPY=False),
    _production("sweep_bf16_softcap", "bf16", "bf16", KIND=KINDS.index("kl_cov"), HAS_SOFTCAP=True),
    _production("sweep_fp32_forward", "fp32", None, ("out", *_MINIMAL), KIND=KINDS.index("cispo"), HAS_ENTROPY=False),
)
