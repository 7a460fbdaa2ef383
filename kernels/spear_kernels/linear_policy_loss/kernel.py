"""Triton kernel of `linear_policy_loss`: statistics, loss derivatives and gradient of one row of logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spear_kernels.compile_check import ARCHITECTURES, Production
from spear_kernels.policy_loss.config import KINDS, KL_KINDS
from spear_kernels.policy_loss.kernel import token_terms
from spear_kernels.tile import (
    LOG2_E,
    SHARED_BYTES,
    SMALL_SHARED_ARCHITECTURES,
    SMALL_SHARED_BYTES,
    finish_softmax,
    finish_statistics,
    finite_peak,
    gradient_coefficients,
    inverse_temperature,
    lane_sums,
    load_tail,
    local_token,
    row_launch,
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


# Not on alignment: slices of per-row tensors start anywhere, and each combination would be compiled.
@triton.jit(
    do_not_specialize=["num_rows", "stride", "out_stride"],
    do_not_specialize_on_alignment=[
        "logits", "ids", "temperature", "old_logp", "advantages", "aggregation_weight", "row_weight", "ref_logp",
        "selected", "statistics", "d_logp", "d_entropy", "out",
    ],
)  # fmt: skip
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
    start = row_start(logits, row, stride, ALIGNED)
    weight = tl.load(aggregation_weight + row)
    row_inverse = inverse_temperature(temperature, temperature_value, row)
    token = local_token(ids, row, vocab_size)
    logp = 0.0
    entropy = 0.0
    peak = 0.0
    log_total = 0.0
    inverse = 1.0
    token_slope = 0.0
    entropy_slope = 0.0
    # The only program on a multiprocessor has nobody else to work while it waits, so the last block is fetched before
    # the others, and the numbers of the token before the sums are joined. A soft-cap needs the registers.
    EARLY: tl.constexpr = out is not None and not HAS_SOFTCAP
    tail = tl.zeros([BLOCK // WIDTH, WIDTH], logits.dtype.element_ty)
    if EARLY:
        tail = load_tail(start, vocab_size, BLOCK, WIDTH)
    # Masked rows may hold anything, so nothing of theirs is used.
    if weight != 0:
        inverse = row_inverse
        scale = inverse * LOG2_E
        peak, total, weighted = lane_sums(start, vocab_size, scale, softcap, HAS_SOFTCAP, BLOCK, WIDTH, STAGES)
        if not EARLY:
            tail = load_tail(start, vocab_size, BLOCK, WIDTH)
        target = target_logit(start, token, softcap, HAS_SOFTCAP)
        before = tl.load(old_logp + row)
        advantage = tl.load(advantages + row)
        own_weight = optional(row_weight, row, 1.0)
        reference = optional(ref_logp, row, 0.0)
        chosen = optional(selected, row, 0.0) != 0
        peak, total, weighted = finish_softmax(
            peak, total, weighted, tail, vocab_size, scale, softcap, HAS_SOFTCAP, BLOCK, WIDTH
        )
        logp, entropy, log_total = finish_statistics(target, peak, total, weighted, inverse)
        _, _, slope, _, _, _, _ = token_terms(
            logp,
            before,
            advantage,
            own_weight,
            reference,
            chosen,
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
                tail,
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


def _production(
    name: str, out: str | None, absent: tuple[str, ...] = (), small: bool = False, **changes: Any
) -> Production:
    """A launch on float32 logits with 152064 columns and a gradient of type `out`; the arguments in `absent` are None.

    `small` is for the architectures on which blocks that are read twice are smaller.
    """
    shared_bytes = SMALL_SHARED_BYTES if small else SHARED_BYTES
    launch = row_launch(152064, 4, 1 if out is None else 2, shared_bytes)
    types = {"out": f"*{out}", "ids": "*i64", "selected": "*u8", "vocab_size": "i32:16", "width": "i32:16"}
    types |= dict.fromkeys(("num_rows", "stride", "out_stride"), "i32")
    numbers = ("temperature_value", "softcap", "clip_low", "clip_high", "dual_clip", "kl_cov_coef", "kl_coef")
    types |= dict.fromkeys((*numbers, "entropy_coef"), "fp32")
    types |= {key: value for key, value in changes.items() if isinstance(value, str)}
    constants = {"KIND": KINDS.index("clip_cov"), "KL_KIND": KL_KINDS.index("k3"), "HAS_DUAL_CLIP": True}
    constants |= {"HAS_ENTROPY": True, "HAS_SOFTCAP": False, "ALIGNED": True, **launch.constants}
    constants |= dict.fromkeys(absent) | {key: value for key, value in changes.items() if not isinstance(value, str)}
    names = sweep_kernel.arg_names
    signature = {key: types.get(key, "*fp32") for key in names if key not in constants}
    archs = SMALL_SHARED_ARCHITECTURES if small else ARCHITECTURES
    # Twice the registers for half the warps.
    max_registers = 128 if small else 64
    # A last block that is loaded element by element costs up to four registers on sm_80, once a row and in no loop.
    max_spill_bytes = 16 if signature["vocab_size"] == "i32" else 0
    shared = 2 * launch.block * 4
    return Production(
        name,
        sweep_kernel,
        signature,
        constants,
        launch.num_warps,
        launch.stages,
        max_registers,
        max_spill_bytes,
        shared,
        archs,
    )


_MINIMAL = ("temperature", "row_weight", "ref_logp", "selected")
_PPO: dict[str, Any] = {"KIND": KINDS.index("ppo"), "HAS_ENTROPY": False}
_KL_COV: dict[str, Any] = {"KIND": KINDS.index("kl_cov"), "HAS_SOFTCAP": True}

PRODUCTION = (
    _production("sweep_to_bf16", "bf16"),
    _production("sweep_to_bf16_small", "bf16", small=True),
    # A head that is padded to 152064 rows beyond a vocabulary of 151665.
    _production("sweep_in_place_odd", "fp32", _MINIMAL, vocab_size="i32", **_PPO),
    _production("sweep_in_place", "fp32", _MINIMAL, **_PPO),
    _production("sweep_in_place_softcap", "fp32", **_KL_COV),
    _production("sweep_in_place_softcap_small", "fp32", small=True, **_KL_COV),
    _production("sweep_forward", None, ("out", *_MINIMAL), KIND=KINDS.index("cispo"), HAS_ENTROPY=False),
)
