"""Triton kernel of the linear head's forward: tiles of logits that are reduced while they lie in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from spear_kernels.backend import INTERPRETED
from spear_kernels.tile import LOG2_E, fold_block, soft_cap

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def grouped_tile(index, num_rows, num_columns, GROUP: tl.constexpr):
    """Place (row, column) of tile `index` in a grid walked by bands of GROUP rows, column by column within a band."""
    band = index // (GROUP * num_columns)
    height = tl.minimum(num_rows - band * GROUP, GROUP)
    inside = index % (GROUP * num_columns)
    return band * GROUP + inside % height, inside // height


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b in float32."""
    if _INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16; widening changes no value.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product_tile(
    a_rows,
    row_live,
    b_columns,
    column_live,
    first,
    last,
    depth,
    readable,
    stride_bk,
    TAIL_APART: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A float32 tile [M, N] of a product over k in [0, depth), of which it does the steps [first, last) of BLOCK_K.

    a_rows [M] and b_columns [N] point at k = 0; a has unit stride along k. Columns of a in [depth, readable) exist and
    may hold anything. TAIL_APART: whole steps do not test k. With a depth that 16 does not divide, the test would make
    the compiler load a element by element; with others it costs less than the registers of a second product.
    """
    k = tl.arange(0, BLOCK_K)
    begin = tl.cast(first, tl.int64) * BLOCK_K
    a_tile = a_rows[:, None] + (begin + k)[None, :]
    b_tile = b_columns[None, :] + (begin + k)[:, None] * stride_bk
    step_b = tl.cast(stride_bk, tl.int64) * BLOCK_K
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = depth // BLOCK_K
    for step in range(first, tl.minimum(last, whole) if TAIL_APART else last):
        a_live, b_live = row_live[:, None], column_live[None, :]
        if not TAIL_APART:
            inside = step * BLOCK_K + k < depth
            a_live, b_live = a_live & inside[None, :], b_live & inside[:, None]
        a = tl.load(a_tile, mask=a_live, other=0.0)
        b = tl.load(b_tile, mask=b_live, other=0.0)
        tile = add_product(tile, a, b, PRECISION)
        a_tile += BLOCK_K
        b_tile += step_b
    if TAIL_APART:  # noqa: SIM102 - decided when compiling, unlike the next condition.
        if last > whole:
            here = whole * BLOCK_K + k
            inside = here < depth
            a = tl.load(a_tile, mask=row_live[:, None] & (here < readable)[None, :], other=0.0)
            b = tl.load(b_tile, mask=column_live[None, :] & inside[:, None], other=0.0)
            # Not left to the zeros of b: what lies beyond the depth may be NaN.
            tile = add_product(tile, tl.where(inside[None, :], a, 0.0).to(a.dtype), b, PRECISION)
    return tile


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns of a tile [M, N]."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def absorb_raw(
    peak,
    total,
    weighted,
    target,
    raw,
    first_column,
    bias,
    wanted,
    holds_target,
    inverse,
    vocab_size,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SLICES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Running row sums with raw logits [M, N] of the columns from first_column added, N / SLICES columns at a time.

    A slice is finished before the next begins, so that the registers need not hold a second tile.
    """
    if SLICES > 1:
        HALF: tl.constexpr = N // 2
        left, right = halves(raw, M, N)  # pyright: ignore[reportGeneralTypeIssues]
        peak, total, weighted, target = absorb_raw(
            peak,
            total,
            weighted,
            target,
            left,
            first_column,
            bias,
            wanted,
            holds_target,
            inverse,
            vocab_size,
            softcap,
            HAS_SOFTCAP,
            SLICES // 2,
            M,
            HALF,
        )
        peak, total, weighted, target = absorb_raw(
            peak,
            total,
            weighted,
            target,
            right,
            first_column + HALF,
            bias,
            wanted,
            holds_target,
            inverse,
            vocab_size,
            softcap,
            HAS_SOFTCAP,
            SLICES // 2,
            M,
            HALF,
        )
    else:
        columns = first_column + tl.arange(0, N)
        column_live = columns < vocab_size
        z = raw
        if bias is not None:
            z += tl.load(bias + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
        z, _ = soft_cap(z, softcap, HAS_SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
        # Added in the instruction that multiplies; a choice for each element would be one more.
        z = z * inverse[:, None] + tl.where(column_live, 0.0, float("-inf"))[None, :]
        peak, total, weighted = fold_block(peak, total, weighted, z, LOG2_E)  # pyright: ignore[reportGeneralTypeIssues]
        if holds_target:
            hit = columns[None, :] == wanted[:, None]
            target = tl.maximum(target, tl.max(tl.where(hit, z, float("-inf")), 1))
    return peak, total, weighted, target


# A pointer to one value for each row may point into the middle of an array, with any alignment.
@triton.jit(do_not_specialize=["num_rows", "num_splits"], do_not_specialize_on_alignment=["ids", "temperature"])
def fused_partials_kernel(
    hidden,
    weight,
    bias,
    ids,
    temperature,
    out,
    num_rows,
    width,
    vocab_size,
    num_splits,
    stride_hidden,
    stride_weight,
    temperature_value,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Partials [splits, 4, n] of z = soft-capped (hidden [n, H] @ weight [V, H].T + bias [V]) / T, tile by tile.

    One program reduces BLOCK_M rows over one share of the vocabulary: peak = max z, total = sum exp(z - peak),
    weighted = sum exp(z - peak) (z - peak), target = z[id] (-inf if the id lies outside the share).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    row_block, split = grouped_tile(tl.program_id(0), row_blocks, num_splits, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = rows < num_rows
    wanted = tl.load(ids + rows, mask=row_live, other=-1)
    wanted = tl.where((wanted >= 0) & (wanted < vocab_size), wanted, -1).to(tl.int32)
    if temperature is not None:
        values = tl.load(temperature + rows, mask=row_live, other=1.0)
    else:
        values = tl.zeros((BLOCK_M,), tl.float32) + temperature_value
    inverse = tl.div_rn(1.0, values)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    blocks = tl.cdiv(vocab_size, BLOCK_N)
    for block in range(blocks * split // num_splits, blocks * (split + 1) // num_splits):
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # With a large vocabulary most blocks hold the target of none of the rows.
        holds_target = tl.max((wanted // BLOCK_N == block).to(tl.int32), 0) > 0
        tile = product_tile(
            hidden + rows * stride_hidden,
            row_live,
            weight + columns.to(tl.int64) * stride_weight,
            columns < vocab_size,
            0,
            tl.cdiv(width, BLOCK_K),
            width,
            width,
            1,
            False,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        peak, total, weighted, target = absorb_raw(
            peak,
            total,
            weighted,
            target,
            tile,
            block * BLOCK_N,
            bias,
            wanted,
            holds_target,
            inverse,
            vocab_size,
            softcap,
            HAS_SOFTCAP,
            SLICES,
            BLOCK_M,
            BLOCK_N,
        )
    # [splits, 4, n]
    place = out + split.to(tl.int64) * 4 * num_rows + rows
    step = tl.cast(num_rows, tl.int64)
    tl.store(place, peak, mask=row_live)
    tl.store(place + step, total, mask=row_live)
    tl.store(place + 2 * step, weighted * (1 / LOG2_E), mask=row_live)  # The running sum is in units of log 2.
    tl.store(place + 3 * step, target, mask=row_live)
