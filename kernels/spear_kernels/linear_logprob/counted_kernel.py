"""Triton kernels of products over rows whose number lies in device memory."""

from __future__ import annotations

import triton
import triton.language as tl

from spear_kernels.linear_logprob.kernel import add_product, grouped_tile, halves, product_tile
from spear_kernels.linear_logprob.tile import PART_OVERHEAD, PART_WAVES

_WAVES = tl.constexpr(PART_WAVES)
_OVERHEAD = tl.constexpr(PART_OVERHEAD)


@triton.jit
def divide_last_wave(tiles, steps, num_processors, num_slots):
    """How `tiles` tiles of `steps` steps are shared out: tiles that one program does alone, and parts of each other.

    Full waves, one program a processor, need no division. The tiles of the unfilled wave are cut along the depth into
    the number of parts that finishes soonest in 1 to PART_WAVES waves, at most `num_slots` parts in all; a part costs
    PART_OVERHEAD steps beside its own. The number depends on the count of live rows, so that few rows are not left to
    few processors.
    """
    alone = tiles // num_processors * num_processors
    rest = tl.maximum(tiles - alone, 1)
    best = tl.cast(1, tl.int32)
    shortest = steps
    for waves in tl.static_range(1, _WAVES + 1):  # pyright: ignore[reportGeneralTypeIssues]
        parts = tl.minimum(tl.minimum(waves * num_processors, num_slots) // rest, steps)
        duration = waves * (tl.cdiv(steps, tl.maximum(parts, 1)) + _OVERHEAD)
        better = duration < shortest
        best = tl.where(better, parts, best)
        shortest = tl.where(better, duration, shortest)
    return alone, best


@triton.jit
def write_rows(
    tile, out, bias, order, places, row_live, columns, out_width, writable, stride_out, SCATTER: tl.constexpr
):
    """Write a tile [M, N] plus bias, in the type of `out`, to the rows order[places] if SCATTER, else places.

    Columns in [out_width, writable) get zeros: a store that 16 columns share a test of is one of vectors.
    """
    if bias is not None:
        tile += tl.load(bias + columns, mask=columns < out_width, other=0.0).to(tl.float32)[None, :]
    rows = places
    if SCATTER:
        rows = tl.load(order + places, mask=row_live, other=0)
    where = (out + rows * stride_out)[:, None] + columns[None, :]
    tl.store(where, tile.to(out.dtype.element_ty), mask=row_live[:, None] & (columns < writable)[None, :])


@triton.jit(do_not_specialize=["num_processors", "num_slots"], do_not_specialize_on_alignment=["order", "count"])
def live_rows_product_kernel(
    a,
    b,
    bias,
    order,
    count,
    out,
    partials,
    out_width,
    writable,
    depth,
    readable,
    num_processors,
    num_slots,
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

    a [n, K], b [K, N] with any strides, bias [N], order int64 [n], count int32 [1], out [n, N]. With partials float32
    [num_slots, BLOCK_M, BLOCK_N], tiles of the last wave may be cut along K: part p of the i-th of r such tiles goes to
    slot p r + i, and `live_rows_sum_kernel` adds them.
    """
    live = tl.load(count)
    column_blocks = tl.cdiv(out_width, BLOCK_N)
    row_blocks = tl.cdiv(live, BLOCK_M)
    tiles = row_blocks * column_blocks
    steps = tl.cdiv(depth, BLOCK_K)
    alone, parts = tiles, 1
    if partials is not None:
        alone, parts = divide_last_wave(tiles, steps, num_processors, num_slots)  # pyright: ignore[reportGeneralTypeIssues]
    index = tl.program_id(0)
    if index >= alone + (tiles - alone) * parts:
        return
    slot = index - alone
    first, last = 0, steps
    if partials is not None:
        # The parts of a tile are as far apart as can be, so that programs side by side share a range of k.
        part = tl.maximum(slot, 0) // tl.maximum(tiles - alone, 1)
        index -= part * (tiles - alone)
        parts = tl.where(slot < 0, 1, parts)
        first, last = steps * part // parts, steps * (part + 1) // parts
    row_block, column_block = grouped_tile(index, row_blocks, column_blocks, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    places = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = places < live
    rows = places
    if GATHER:
        rows = tl.load(order + places, mask=row_live, other=0)
    columns = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = product_tile(
        a + rows * stride_a,
        row_live,
        b + columns * stride_bn,
        columns < out_width,
        first,
        last,
        depth,
        readable,
        stride_bk,
        True,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if partials is None:
        write_rows(tile, out, bias, order, places, row_live, columns, out_width, writable, stride_out, SCATTER)
    elif parts > 1:
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partials + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + inside, tile)
    else:
        write_rows(tile, out, bias, order, places, row_live, columns, out_width, writable, stride_out, SCATTER)


@triton.jit(do_not_specialize=["num_processors", "num_slots"], do_not_specialize_on_alignment=["order", "count"])
def live_rows_sum_kernel(
    partials,
    bias,
    order,
    count,
    out,
    out_width,
    writable,
    depth,
    num_processors,
    num_slots,
    stride_out,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add the parts that `live_rows_product_kernel` left in `partials`, in order, and write the sums to `out`.

    One program does ROWS rows of one of the tiles that were cut.
    """
    live = tl.load(count)
    row_blocks = tl.cdiv(live, BLOCK_M)
    column_blocks = tl.cdiv(out_width, BLOCK_N)
    tiles = row_blocks * column_blocks
    alone, parts = divide_last_wave(tiles, tl.cdiv(depth, BLOCK_K), num_processors, num_slots)  # pyright: ignore[reportGeneralTypeIssues]
    index = tl.program_id(0) // (BLOCK_M // ROWS)
    if (index >= tiles - alone) | (parts == 1):
        return
    row_block, column_block = grouped_tile(alone + index, row_blocks, column_blocks, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    rows = tl.program_id(0) % (BLOCK_M // ROWS) * ROWS + tl.arange(0, ROWS)
    places = row_block.to(tl.int64) * BLOCK_M + rows
    columns = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = (
        partials + index.to(tl.int64) * (BLOCK_M * BLOCK_N) + rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    )
    step = (tiles - alone).to(tl.int64) * (BLOCK_M * BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for part in tl.range(0, parts, num_stages=4):
        total += tl.load(source + part * step)
    write_rows(total, out, bias, order, places, places < live, columns, out_width, writable, stride_out, SCATTER)


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


@triton.jit(do_not_specialize_on_alignment=["order", "count"])
def live_rows_outer_kernel(
    dz,
    x,
    order,
    count,
    out,
    vocab,
    readable,
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
    program, which adds its rows in order: the result does not depend on scheduling. Columns of dz in [V, readable)
    exist and may hold anything; they make rows of the tile that are not written.
    """
    live = tl.load(count)
    if live == 0:
        return
    row_blocks = tl.cdiv(vocab, BLOCK_M)
    column_blocks = tl.cdiv(width, BLOCK_N)
    row_block, column_block = grouped_tile(tl.program_id(0), row_blocks, column_blocks, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    readable_tokens = tokens < readable
    channel_live = channels < width
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    places = tl.arange(0, BLOCK_K).to(tl.int64)
    rows = tl.load(order + places, mask=places < live, other=0)
    for _ in range(0, live, BLOCK_K):
        inside = places < live
        dz_rows = dz + (rows if GATHER_DZ else places) * stride_dz
        x_rows = x + (rows if GATHER_X else places) * stride_x
        left = tl.load(dz_rows[None, :] + tokens[:, None], mask=readable_tokens[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_rows[:, None] + channels[None, :], mask=inside[:, None] & channel_live[None, :], other=0.0)
        tile = add_product(tile, left, right, PRECISION)
        places += BLOCK_K
        if GATHER_DZ or GATHER_X:
            # One step ahead: a load that waits for a load in its own step would not be pipelined.
            rows = tl.load(order + places, mask=places < live, other=0)
    add_to(out + tokens * width, tokens < vocab, column_block * BLOCK_N, width, tile, SLICES, BLOCK_M, BLOCK_N)
