"""Triton kernels of `logprob`: one program per row of logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spear_kernels.compile_check import Production
from spear_kernels.tile import (
    LOG2_E,
    ROW_ARCHITECTURES,
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


# Not on alignment: slices of per-row tensors start anywhere, and each combination would be compiled.
@triton.jit(
    do_not_specialize=["num_rows", "stride"],
    do_not_specialize_on_alignment=["logits", "ids", "temperature", "out"],
)
def row_reduce_kernel(
    logits,  # [n, >= vocab_size]
    ids,  # int64 [n]
    temperature,  # float32 [n] or None
    out,  # float32 [4, n]
    temperature_value,
    softcap,
    num_rows,
    stride,
    vocab_size,
    PARTIALS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write (peak, total, weighted, target) of each row if PARTIALS, else (logp, entropy, peak, log total)."""
    row = tl.program_id(0)
    start = row_start(logits, row, stride, ALIGNED)
    token = local_token(ids, row, vocab_size)
    inverse = inverse_temperature(temperature, temperature_value, row)
    target = target_logit(start, token, softcap, HAS_SOFTCAP)
    scale = inverse * LOG2_E
    peak, total, weighted = lane_sums(start, vocab_size, scale, softcap, HAS_SOFTCAP, BLOCK, WIDTH, STAGES)
    # Not earlier: several programs share a multiprocessor, to which registers are worth more than this wait.
    tail = load_tail(start, vocab_size, BLOCK, WIDTH)
    peak, total, weighted = finish_softmax(
        peak, total, weighted, tail, vocab_size, scale, softcap, HAS_SOFTCAP, BLOCK, WIDTH
    )
    place = out + row
    step = tl.cast(num_rows, tl.int64)
    if PARTIALS:
        tl.store(place, peak * inverse)
        tl.store(place + step, total)
        tl.store(place + 2 * step, weighted)
        tl.store(place + 3 * step, target * inverse)
    else:
        logp, entropy, log_total = finish_statistics(target, peak, total, weighted, inverse)
        tl.store(place, logp)
        tl.store(place + step, entropy)
        tl.store(place + 2 * step, peak * inverse)
        tl.store(place + 3 * step, log_total)


@triton.jit(
    do_not_specialize=["stride", "out_stride"],
    do_not_specialize_on_alignment=[
        "logits", "ids", "temperature", "entropy", "peak", "log_total", "d_logp", "d_entropy", "out"
    ],
)  # fmt: skip
def row_gradient_kernel(
    logits,  # [n, >= vocab_size]
    ids,  # int64 [n]
    temperature,  # float32 [n] or None
    entropy,  # float32 [n]
    peak,  # float32 [n]
    log_total,  # float32 [n]
    d_logp,  # float32 [n]
    d_entropy,  # float32 [n] or None
    out,  # [n, width]
    temperature_value,
    softcap,
    stride,
    out_stride,
    vocab_size,
    width,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradient of sum(d_logp * logp + d_entropy * entropy) with respect to the logits."""
    row = tl.program_id(0)
    start = row_start(logits, row, stride, ALIGNED)
    out_start = row_start(out, row, out_stride, ALIGNED)
    HAS_ENTROPY: tl.constexpr = d_entropy is not None
    weight = tl.load(d_logp + row)
    entropy_weight = 0.0
    if HAS_ENTROPY:
        entropy_weight = tl.load(d_entropy + row)
    row_peak = tl.load(peak + row)
    row_entropy = tl.load(entropy + row)
    row_log_total = tl.load(log_total + row)
    token = local_token(ids, row, vocab_size)
    inverse = inverse_temperature(temperature, temperature_value, row)
    if ((weight == 0) & (entropy_weight == 0)) | (row_peak == float("-inf")):
        write_zeros(out_start, width, BLOCK, WIDTH)
    else:
        offset, slope, hot = gradient_coefficients(weight, entropy_weight, row_entropy, row_log_total, inverse)
        write_gradient(
            start,
            out_start,
            load_tail(start, vocab_size, BLOCK, WIDTH),
            token,
            vocab_size,
            width,
            softcap,
            inverse,
            finite_peak(row_peak),
            LOG2_E,
            offset,
            slope,
            hot,
            HAS_SOFTCAP,
            HAS_ENTROPY,
            BLOCK,
            WIDTH,
            STAGES,
        )


def _production(name: str, kernel: Any, logits: str, absent: tuple[str, ...] = (), **changes: Any) -> Production:
    """A launch of `kernel` on `logits` with 152064 columns; the arguments in `absent` are None."""
    launch = row_launch(152064, {"fp32": 4, "bf16": 2}[logits])
    types = {"logits": f"*{logits}", "ids": "*i64", "vocab_size": "i32:16", "width": "i32:16"}
    types |= dict.fromkeys(("num_rows", "stride", "out_stride"), "i32")
    types |= dict.fromkeys(("temperature_value", "softcap"), "fp32")
    types |= {key: value for key, value in changes.items() if key in kernel.arg_names and isinstance(value, str)}
    constants = {"HAS_SOFTCAP": False, "ALIGNED": True, **launch.constants, **dict.fromkeys(absent)}
    constants |= {key: value for key, value in changes.items() if not isinstance(value, str)}
    # Loads of single elements need an address each.
    max_registers = 64 if constants["ALIGNED"] else 128
    signature = {key: types.get(key, "*fp32") for key in kernel.arg_names if key not in constants}
    return Production(
        name,
        kernel,
        signature,
        constants,
        launch.num_warps,
        launch.stages,
        max_registers,
        0,
        64 << 10,
        ROW_ARCHITECTURES,
    )


_ONE_TEMPERATURE = ("temperature",)
# Logits of a vocabulary like 50257, whose rows start anywhere.
_ODD: dict[str, Any] = {"ALIGNED": False, "vocab_size": "i32", "width": "i32"}

PRODUCTION = (
    _production("row_statistics_fp32", row_reduce_kernel, "fp32", _ONE_TEMPERATURE, PARTIALS=False),
    _production("row_statistics_bf16", row_reduce_kernel, "bf16", _ONE_TEMPERATURE, PARTIALS=False),
    _production("row_statistics_bf16_odd", row_reduce_kernel, "bf16", _ONE_TEMPERATURE, PARTIALS=False, **_ODD),
    _production("row_partials_fp32", row_reduce_kernel, "fp32", _ONE_TEMPERATURE, PARTIALS=True),
    _production("row_partials_bf16_softcap", row_reduce_kernel, "bf16", PARTIALS=True, HAS_SOFTCAP=True),
    _production("row_gradient_fp32_to_bf16", row_gradient_kernel, "fp32", ("temperature", "d_entropy"), out="*bf16"),
    _production("row_gradient_fp32_softcap", row_gradient_kernel, "fp32", HAS_SOFTCAP=True),
    _production("row_gradient_bf16_softcap", row_gradient_kernel, "bf16", out="*bf16", HAS_SOFTCAP=True),
    _production("row_gradient_bf16_odd", row_gradient_kernel, "bf16", out="*bf16", **_ODD),
)
