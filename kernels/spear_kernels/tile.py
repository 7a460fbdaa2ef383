"""How a kernel walks one row of logits: block sizes, softmax statistics in one online pass, gradient.

A block of a row is a matrix [LANES, WIDTH] of consecutive columns; WIDTH elements are one 16-byte load of one thread.
Each lane keeps running statistics of its own, so the loop needs no exchange between threads; they join at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

# exp2(-1000) is 0 in float32, so flooring changes no probability and keeps 0 * -inf out of the entropy.
_FLOOR = tl.constexpr(-1000.0)
LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_IMPOSSIBLE = tl.constexpr(float("-inf"))

VECTOR_BYTES = 16
# By the number of times that a kernel reads a row. One program of 16384 columns and 32 warps fills a multiprocessor, so
# that as few rows as possible are in flight when the second reading begins. By arithmetic the L2 cache (50 MB) still
# holds about half of 132 float32 rows of 152064 columns then, and of twice as many programs of half the size a quarter;
# neither is measured.
LARGEST_BLOCK = {1: 4096, 2: 16384}
NUM_STAGES = 3
# What a block may have on compute capabilities 8.0 and 9.0 at least; 8.6, 8.9 and 12.0 have SMALL_SHARED_BYTES.
SHARED_BYTES = 163 << 10
SMALL_SHARED_BYTES = 99 << 10
SMALL_SHARED_ARCHITECTURES = (86, 89, 120)
ROW_ARCHITECTURES = (80, 90, 100, *SMALL_SHARED_ARCHITECTURES)
# 32 would save a twelfth of the instructions, but spills with a soft-cap.
ELEMENTS_PER_THREAD = 16


@dataclass(frozen=True)
class RowLaunch:
    """Columns per block, columns per load of a thread, stages of the load pipeline and warps of a row kernel."""

    block: int
    width: int
    stages: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The constexpr arguments that every row kernel takes."""
        return {"BLOCK": self.block, "WIDTH": self.width, "STAGES": self.stages}

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps}


def row_launch(vocab_size: int, itemsize: int, passes: int = 1, shared_bytes: int = SHARED_BYTES) -> RowLaunch:
    """The configuration for rows of `vocab_size` logits of `itemsize` bytes that are read `passes` times (1 or 2).

    A block covers a small vocabulary with the next power of two, from 256 columns on; the blocks that the pipeline
    holds at once, one for each stage but the last, fit `shared_bytes`.
    """
    block = min(LARGEST_BLOCK[passes], max(256, 1 << (vocab_size - 1).bit_length()))
    while (NUM_STAGES - 1) * block * itemsize > shared_bytes:
        block //= 2
    warps = max(1, block // (32 * ELEMENTS_PER_THREAD))
    return RowLaunch(block, VECTOR_BYTES // itemsize, NUM_STAGES, warps)


@triton.jit
def row_start(matrix, row, stride, ALIGNED: tl.constexpr):
    """Pointer to the first element of a row; ALIGNED promises 16 bytes."""
    start = matrix + row.to(tl.int64) * stride
    if ALIGNED:
        # Neither pointer nor stride is specialised on, so without this the compiler would load element by element.
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def block_columns(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first block, int32 [BLOCK // WIDTH, WIDTH]."""
    return tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def inverse_temperature(temperature, temperature_value, row):
    """1 / T of a row; `temperature` is a pointer to float32 [n], or None for the same value in all rows."""
    value = temperature_value
    if temperature is not None:
        value = tl.load(temperature + row)
    return tl.div_rn(1.0, value)


@triton.jit
def soft_cap(raw, softcap, HAS_SOFTCAP: tl.constexpr):
    """float32 cap * tanh(raw / cap), and its derivative; (raw, 1) without soft-cap.

    With e = exp(-2 |x|): tanh |x| = (1 - e) / (1 + e), 1 - tanh^2 = 4 e / (1 + e)^2. Neither overflows, the derivative
    does not cancel, and the value errs by a rounding of the cap.
    """
    raw = raw.to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        decay = tl.exp2(tl.abs(raw) * (-2 * LOG2_E / softcap))
        inverse = 1 / (1 + decay)
        size = softcap * (1 - decay) * inverse
        raw = tl.where(raw < 0, -size, size)
        slope = 4 * decay * inverse * inverse
    return raw, slope


@triton.jit
def local_token(ids, row, vocab_size):
    """The token of a row, int32, -1 if this shard of the vocabulary does not hold it.

    Comparing every column with 64 bits would cost a fifth of the instructions of a gradient.
    """
    token = tl.load(ids + row)
    return tl.where((token >= 0) & (token < vocab_size), token, -1).to(tl.int32)


@triton.jit
def target_logit(start, token, softcap, HAS_SOFTCAP: tl.constexpr):
    """Capped logit of a `local_token`, -inf for -1."""
    inside = token >= 0
    logit, _ = soft_cap(tl.load(start + token, mask=inside, other=0.0), softcap, HAS_SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.where(inside, logit, _IMPOSSIBLE)


@triton.jit
def finite_peak(peak):
    """The peak, or 0 where all logits are -inf, so that -inf - peak is no NaN."""
    return tl.where(peak == _IMPOSSIBLE, 0.0, peak)


@triton.jit
def log2_weight(difference, scale):
    """difference * scale, floored where exp2 is 0; NaN stays NaN, so that a broken row shows."""
    return tl.maximum(difference * scale, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold_block(peak, total, weighted, logits, scale):
    """Add capped logits [LANES, WIDTH] to running statistics [LANES] (of exp2; scale = log2(e) / T)."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    base = finite_peak(new_peak)
    fall = log2_weight(peak - base, scale)
    fade = tl.exp2(fall)
    power = log2_weight(logits - base[:, None], scale)
    weights = tl.exp2(power)
    weighted = (weighted + total * fall) * fade + tl.sum(weights * power, 1)
    total = total * fade + tl.sum(weights, 1)
    return new_peak, total, weighted


@triton.jit
def join_lanes(peak, total, weighted, scale):
    """Statistics of a row from those of its lanes [LANES]; `weighted` changes from log2 units to nats."""
    row_peak = tl.max(peak, 0)
    fall = log2_weight(peak - finite_peak(row_peak), scale)
    fade = tl.exp2(fall)
    return row_peak, tl.sum(total * fade, 0), tl.sum((weighted + total * fall) * fade, 0) * _LN_2


@triton.jit
def load_tail(start, vocab_size, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The last block of a row, the only masked one: -inf from vocab_size on."""
    here = vocab_size // BLOCK * BLOCK + block_columns(BLOCK, WIDTH)
    return tl.load(start + here, mask=here < vocab_size, other=_IMPOSSIBLE)


@triton.jit
def lane_sums(
    start,
    vocab_size,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Running statistics [LANES] of all blocks of a row but the last."""
    columns = block_columns(BLOCK, WIDTH)
    peak = tl.full([BLOCK // WIDTH], _IMPOSSIBLE, tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    weighted = tl.zeros([BLOCK // WIDTH], tl.float32)
    for first in tl.range(0, vocab_size // BLOCK * BLOCK, BLOCK, num_stages=STAGES):
        raw = tl.load(start + (first + columns))
        logits, _ = soft_cap(raw, softcap, HAS_SOFTCAP)
        peak, total, weighted = fold_block(peak, total, weighted, logits, scale)
    return peak, total, weighted


@triton.jit
def finish_softmax(
    peak,
    total,
    weighted,
    tail,
    vocab_size,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of capped logits y: peak = max y, total = sum exp(d), weighted = sum exp(d) d, with d = (y - peak) / T.

    The peak is that of y and not of y / T: differences of logits are then taken before they are rounded by the scaling.
    The first three arguments are from `lane_sums`, `tail` from `load_tail`.
    """
    inside = vocab_size // BLOCK * BLOCK + block_columns(BLOCK, WIDTH) < vocab_size
    logits, _ = soft_cap(tail, softcap, HAS_SOFTCAP)
    # A soft-cap has made -inf finite.
    logits = tl.where(inside, logits, _IMPOSSIBLE)
    peak, total, weighted = fold_block(peak, total, weighted, logits, scale)
    return join_lanes(peak, total, weighted, scale)


@triton.jit
def finish_statistics(target, peak, total, weighted, inverse):
    """logp, entropy and log total from `row_softmax`; a row of -inf alone gives -inf, 0, -inf."""
    log_total = tl.log(total)
    empty = total == 0
    logp = tl.where(empty, _IMPOSSIBLE, (target - finite_peak(peak)) * inverse - log_total)
    entropy = tl.where(empty, 0.0, log_total - weighted / total)
    return logp, entropy, log_total


@triton.jit
def gradient_coefficients(d_logp, d_entropy, entropy, log_total, inverse):
    """Numbers (offset, slope, hot) of a row with dy = exp2(power) * (offset + slope * power) + hot * onehot.

    From dz = p (-d_logp - d_entropy (log p + entropy)) + d_logp onehot with log p = power ln 2 - log total.
    """
    inverse_total = tl.exp(-log_total)
    slope = -d_entropy * inverse_total
    offset = -d_logp * inverse_total + slope * (entropy - log_total)
    return offset * inverse, slope * _LN_2 * inverse, d_logp * inverse


@triton.jit
def gradient_block(
    raw,
    columns,
    token,
    softcap,
    before,
    peak,
    after,
    offset,
    slope,
    hot,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Gradient with respect to raw logits [LANES, WIDTH], where power = (capped logit * before - peak) * after."""
    logits, bend = soft_cap(raw, softcap, HAS_SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
    power = log2_weight(logits * before - peak, after)
    factor = offset
    if HAS_ENTROPY:
        factor = offset + slope * power
    return (tl.exp2(power) * factor + tl.where(columns == token, hot, 0.0)) * bend


@triton.jit
def store_gradient(pointers, gradient, mask=None):
    """Store values that this kernel does not read again.

    They are the first to leave the L2 cache, so that logits can stay until their second reading; that this pays is
    not measured.
    """
    tl.store(pointers, gradient.to(pointers.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def write_gradient(
    start,
    out_start,
    tail,
    token,
    vocab_size,
    width,
    softcap,
    before,
    peak,
    after,
    offset,
    slope,
    hot,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradient of a row of `width` columns, zeros from vocab_size on, from the last block to the first.

    Backwards, because what a forward pass over the row read last is still in the cache, and its beginning may not be.
    `tail` is from `load_tail`.
    """
    columns = block_columns(BLOCK, WIDTH)
    whole = vocab_size // BLOCK * BLOCK
    here = whole + columns
    gradient = gradient_block(
        tail, here, token, softcap, before, peak, after, offset, slope, hot, HAS_SOFTCAP, HAS_ENTROPY
    )
    store_gradient(out_start + here, tl.where(here < vocab_size, gradient, 0.0), here < width)
    for first in range(whole + BLOCK, width, BLOCK):
        store_gradient(out_start + (first + columns), tl.zeros_like(gradient), first + columns < width)
    for done in tl.range(0, whole, BLOCK, num_stages=STAGES):
        here = whole - BLOCK - done + columns
        raw = tl.load(start + here)
        gradient = gradient_block(
            raw, here, token, softcap, before, peak, after, offset, slope, hot, HAS_SOFTCAP, HAS_ENTROPY
        )
        store_gradient(out_start + here, gradient)


@triton.jit
def write_zeros(out_start, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write zeros to a row."""
    columns = block_columns(BLOCK, WIDTH)
    zeros = tl.zeros([BLOCK // WIDTH, WIDTH], out_start.dtype.element_ty)
    for first in range(0, width, BLOCK):
        tl.store(out_start + (first + columns), zeros, mask=first + columns < width)
