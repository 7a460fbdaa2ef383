"""Triton kernels of the linear head: logits reduced in registers, and products over rows counted on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from spear_kernels.backend import INTERPRETED
from spear_kernels.compile_check import Production
from spear_kernels.linear_logprob.tile import Tile, forward_tile, outer_tile, product_tile_of
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
    depth,
    stride_ak,
    stride_bk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A float32 tile [M, N] of a product over k in [0, depth): a_rows [M] and b_columns [N] point at k = 0."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a_rows[:, None] + k[None, :].to(tl.int64) * stride_ak
    b_tile = b_columns[None, :] + k[:, None].to(tl.int64) * stride_bk
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    step_b = tl.cast(stride_bk, tl.int64) * BLOCK_K
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        a = tl.load(a_tile, mask=row_live[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_tile, mask=column_live[None, :] & inside[:, None], other=0.0)
        tile = add_product(tile, a, b, PRECISION)
        a_tile += step_a
        b_tile += step_b
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
        z = tl.where(column_live[None, :], z * inverse[:, None], float("-inf"))
        peak, total, weighted = fold_block(peak, total, weighted, z, LOG2_E)  # pyright: ignore[reportGeneralTypeIssues]
        if holds_target:
            hit = columns[None, :] == wanted[:, None]
            target = tl.maximum(target, tl.max(tl.where(hit, z, float("-inf")), 1))
    return peak, total, weighted, target


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
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
            width,
            1,
            1,
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


@triton.jit
def live_rows_product_kernel(
    a,
    b,
    bias,
    order,
    count,
    out,
    out_width,
    depth,
    stride_a,
    stride_bk,
    stride_bn,
    stride_out,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[o] = a[r] @ b + bias for i < count, r = order[i] if GATHER else i, o = order[i] if SCATTER else i.

    a [n, K], b [K, N] with any strides, bias [N], order int64 [n], count int32 [1], out [n, N].
    """
    live = tl.load(count)
    row_blocks = tl.cdiv(live, BLOCK_M)
    column_blocks = tl.cdiv(out_width, BLOCK_N)
    index = tl.program_id(0)
    if index >= row_blocks * column_blocks:
        return
    row_block, column_block = grouped_tile(index, row_blocks, column_blocks, GROUP)
    places = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = places < live
    rows = places
    if GATHER or SCATTER:
        rows = tl.load(order + places, mask=row_live, other=0)
    a_rows = a + (rows if GATHER else places) * stride_a
    columns = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_live = columns < out_width
    b_columns = b + columns * stride_bn
    tile = product_tile(
        a_rows, row_live, b_columns, column_live, depth, 1, stride_bk, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if bias is not None:
        tile += tl.load(bias + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
    out_rows = out + (rows if SCATTER else places) * stride_out
    where = out_rows[:, None] + columns[None, :]
    tl.store(where, tile.to(out.dtype.element_ty), mask=row_live[:, None] & column_live[None, :])


@triton.jit
def add_to(out_rows, row_live, first_column, width, tile, SLICES: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Add a tile [M, N] to memory, N / SLICES columns at a time, so that old values and tile fit the registers."""
    if SLICES > 1:
        HALF: tl.constexpr = N // 2
        left, right = halves(tile, M, N)  # pyright: ignore[reportGeneralTypeIssues]
        add_to(out_rows, row_live, first_column, width, left, SLICES // 2, M, HALF)
        add_to(out_rows, row_live, first_column + HALF, width, right, SLICES // 2, M, HALF)
    else:
        columns = first_column + tl.arange(0, N)
        where = out_rows[:, None] + columns[None, :]
        mask = row_live[:, None] & (columns < width)[None, :]
        tl.store(where, tl.load(where, mask=mask, other=0.0) + tile, mask=mask)


@triton.jit
def live_rows_outer_kernel(
    dz,
    x,
    order,
    count,
    out,
    vocab,
    width,
    stride_dz,
    stride_x,
    GATHER_DZ: tl.constexpr,
    GATHER_X: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out += sum over i < count of dz[r]^T x[s], r and s = order[i] if gathered, else i.

    dz [n, V], x [n, H], order int64 [n], count int32 [1], out float32 [V, H]. Every element of out belongs to one
    program, which adds its rows in order: the result does not depend on scheduling.
    """
    live = tl.load(count)
    if live == 0:
        return
    row_blocks = tl.cdiv(vocab, BLOCK_M)
    column_blocks = tl.cdiv(width, BLOCK_N)
    row_block, column_block = grouped_tile(tl.program_id(0), row_blocks, column_blocks, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_live = tokens < vocab
    channel_live = channels < width
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    places = tl.arange(0, BLOCK_K).to(tl.int64)
    rows = tl.load(order + places, mask=places < live, other=0)
    for _ in range(0, live, BLOCK_K):
        inside = places < live
        dz_rows = dz + (rows if GATHER_DZ else places) * stride_dz
        x_rows = x + (rows if GATHER_X else places) * stride_x
        left = tl.load(dz_rows[:, None] + tokens[None, :], mask=inside[:, None] & token_live[None, :], other=0.0)
        right = tl.load(x_rows[:, None] + channels[None, :], mask=inside[:, None] & channel_live[None, :], other=0.0)
        tile = add_product(tile, tl.trans(left), right, PRECISION)
        places += BLOCK_K
        if GATHER_DZ or GATHER_X:
            # One step ahead: a load that waits for a load in its own step would not be pipelined.
            rows = tl.load(order + places, mask=places < live, other=0)
    add_to(out + tokens * width, token_live, column_block * BLOCK_N, width, tile, SLICES, BLOCK_M, BLOCK_N)


TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # float16 differs from bfloat16 in nothing here.
FORWARD = {
    "hidden": "*{}:16",
    "weight": "*{}:16",
    "ids": "*i64:16",
    "out": "*fp32:16",
    "num_rows": "i32",
    "width": "i32:16",
    "vocab_size": "i32:16",
    "num_splits": "i32",
    "stride_hidden": "i32:16",
    "stride_weight": "i32:16",
    "temperature_value": "fp32",
    "softcap": "fp32",
}
FORWARD_OPTIONS = {"bias": "*{}:16", "temperature": "*fp32:16"}
PRODUCT = {
    "a": "*{}:16",
    "b": "*{}:16",
    "order": "*i64:16",
    "count": "*i32:16",
    "out": "*{}:16",
    "out_width": "i32:16",
    "depth": "i32:16",
    "stride_a": "i32:16",
    "stride_out": "i32:16",
}
OUTER = {
    "dz": "*{}:16",
    "x": "*{}:16",
    "order": "*i64:16",
    "count": "*i32:16",
    "out": "*fp32:16",
    "vocab": "i32:16",
    "width": "i32:16",
    "stride_dz": "i32:16",
    "stride_x": "i32:16",
}


@dataclass(frozen=True)
class _Target:
    """A data type and the architectures that launch the same tiles for it."""

    dtype: torch.dtype
    archs: tuple[int, ...]
    suffix: str
    max_shared_bytes: int

    def production(self, name: str, kernel: Any, tile: Tile, signature: dict[str, str], **constants: Any) -> Production:
        """`kernel` on this target; "{}" in a type of `signature` stands for the data type."""
        kind = TYPE_NAMES[self.dtype]
        return Production(
            name=f"{name}-{kind}{self.suffix}",
            kernel=kernel,
            signature={key: value.format(kind) for key, value in signature.items()},
            constants={**tile.constants(self.dtype), **constants},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_registers=255,
            max_spill_bytes=64,
            max_shared_bytes=self.max_shared_bytes,
            archs=self.archs,
        )


def _productions(target: _Target) -> tuple[Production, ...]:
    """The leanest and the fullest variant of the forward kernel, the others as the operators call them."""
    dtype, arch = target.dtype, target.archs[0]
    forward, product, outer = forward_tile(dtype, arch), product_tile_of(dtype, arch), outer_tile(dtype, arch)
    lean = {"bias": None, "temperature": None, "HAS_SOFTCAP": False, "SLICES": forward.slices}
    full = {"HAS_SOFTCAP": True, "SLICES": forward.slices}
    logits = {"bias": None, "stride_bk": 1, "GATHER": True, "SCATTER": False}
    hidden = {"bias": None, "stride_bn": 1, "GATHER": False, "SCATTER": True}
    weight = {"GATHER_DZ": True, "GATHER_X": True, "SLICES": outer.slices}
    return (
        target.production("fused_partials-lean", fused_partials_kernel, forward, FORWARD, **lean),
        target.production("fused_partials-full", fused_partials_kernel, forward, FORWARD | FORWARD_OPTIONS, **full),
        target.production(
            "live_rows_product-logits",
            live_rows_product_kernel,
            product,
            {**PRODUCT, "out": "*fp32:16", "stride_bn": "i32:16"},
            **logits,
        ),
        target.production(
            "live_rows_product-hidden", live_rows_product_kernel, product, {**PRODUCT, "stride_bk": "i32:16"}, **hidden
        ),
        target.production("live_rows_outer", live_rows_outer_kernel, outer, OUTER, **weight),
    )


TARGETS = (
    _Target(torch.bfloat16, (90, 100), "", 200 << 10),
    _Target(torch.bfloat16, (80,), "-sm_80", 100 << 10),
    _Target(torch.bfloat16, (86,), "-small", 50 << 10),
    _Target(torch.float32, (80, 90, 100), "", 34 << 10),
)
PRODUCTION = tuple(production for target in TARGETS for production in _productions(target))
