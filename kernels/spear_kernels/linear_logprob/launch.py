"""Launches the kernels of the linear head; no launch makes the host wait for the device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from spear_kernels.linear_logprob.counted_kernel import (
    live_rows_outer_kernel,
    live_rows_product_kernel,
    live_rows_sum_kernel,
)
from spear_kernels.linear_logprob.kernel import fused_partials_kernel
from spear_kernels.linear_logprob.tile import (
    PART_BYTES,
    PART_DEPTH,
    PART_WAVES,
    SUM_ROWS,
    Tile,
    forward_tile,
    outer_tile,
    product_tile_of,
)
from spear_kernels.logprob.launch import vector

# A share of the vocabulary starts and ends with an unfilled pipeline, worth about half a tile.
_SHARE_OVERHEAD = 0.5
# Row blocks share weight tiles through the L2 cache only if few of them and several shares run side by side.
_LEAST_SPLITS, _MOST_SPLITS = 8, 32


def fused_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Softmax sums of each row over shares of the vocabulary, float32 [S, 4, n], without any logits in memory.

    With z = soft-capped (hidden @ weight.T + bias) / T over the columns of a share: peak = max z, total = sum exp(z -
    peak), weighted = sum exp(z - peak) (z - peak), target = z[id] or -inf where the id lies in another share. Products
    are summed in float32 and not rounded in between.

    hidden [n, H] and weight [>= vocab_size, H] of one type, float32, bfloat16 or float16; bias [V] any float type; ids
    int64 [n], any value; temperature float32 [n] or None for `temperature_value`; softcap 0 for none; columns from
    vocab_size on are padding. num_splits S is chosen to fill the device unless given.

    Raises:
        ValueError: types that differ or have no kernel, widths that differ, or vocab_size or num_splits out of range.
    """
    _check_pair("hidden", hidden, "weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {hidden.shape[1]} wide, weight {weight.shape[1]}; both must be H")
    if not 1 <= vocab_size <= len(weight):
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {len(weight)} rows of weight")
    tile = tile or forward_tile(hidden.dtype, architecture(hidden.device))
    blocks = -(-vocab_size // tile.block_n)
    row_blocks = -(-len(hidden) // tile.block_m)
    splits = choose_splits(row_blocks, blocks, processors(hidden.device)) if num_splits is None else num_splits
    if not 1 <= splits <= blocks:
        raise ValueError(f"num_splits={num_splits} must be between 1 and the {blocks} blocks of the vocabulary")
    hidden, weight = _unit_stride(hidden), _unit_stride(weight)
    out = torch.empty(splits, 4, len(hidden), dtype=torch.float32, device=hidden.device)
    _launch(
        fused_partials_kernel,
        row_blocks * splits,
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        ids.contiguous(),
        vector(temperature),
        out,
        len(hidden),
        hidden.shape[1],
        vocab_size,
        splits,
        hidden.stride(0),
        weight.stride(0),
        float(temperature_value),
        float(softcap),
        HAS_SOFTCAP=softcap != 0,
        SLICES=tile.slices,
        **tile.launch(hidden.dtype),
    )
    return out


def live_rows_product(
    a: torch.Tensor,
    b: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gather: bool = True,
    scatter: bool = True,
    overwrite_padding: bool = False,
    tile: Tile | None = None,
    num_processors: int | None = None,
) -> torch.Tensor:
    """out[o] = a[r] @ b + bias for i < count, with r = order[i] if `gather` else i, o = order[i] if `scatter` else i.

    Logits of live rows into a compact buffer: `live_rows_product(x, weight.t(), order, count, z, scatter=False)`; the
    hidden gradient back from there: `live_rows_product(dz, weight, order, count, dx, gather=False)`. Rows of `out` that
    are not written keep what they hold.

    a [n, K] and b [K, N] of one type, float32, bfloat16 or float16 (b with any strides, one of them 1 to be fast); bias
    [N]; order int64 [>= count] of distinct rows; count int32 [1] on the device, at most the rows of a and out; out [m,
    N] any float type, last stride 1. The sum is float32 and rounded once, to the type of `out`, which is returned.
    Programs for rows from count on end at once. Columns of `a` from K up to the next multiple of 16 may be read where
    the memory has them, and count for nothing. `overwrite_padding` lets those of `out` get zeros, which spares a store
    for each element where 16 does not divide N.

    Cost: live tiles that fill whole waves of programs, one a processor (`num_processors`, None: those of the device),
    run as they are. If K is above PART_DEPTH, those of the last wave are cut along K into the number of parts that
    finishes soonest, by the count on the device. Parts are float32 in memory, PART_WAVES tiles a processor (50 MiB for
    132 processors and tiles of 128 x 256) and at most PART_BYTES, and a second kernel adds them in order: the same
    result in every run, though not bit for bit that of another count. By the steps, with K 152064 and 132 processors: N
    1536 and 1171 rows take 0.51 times a tile (uncut 1), N 3584 1.07 (uncut 2) and with 117 rows 0.12 (uncut 1); the
    floor without any loss is 0.45, 1.06 and 0.11. Not measured on a GPU.

    Raises:
        ValueError: types that differ or have no kernel, or shapes or strides that do not fit.
    """
    _check_product(a, b, out)
    _check_order(order, count)
    a, bias = _unit_stride(a), None if bias is None else bias.contiguous()
    tile = tile or product_tile_of(a.dtype, architecture(a.device))
    width, depth = out.shape[1], a.shape[1]
    writable = padded_width(out) if overwrite_padding else width
    rows = min(len(order), len(order) if gather else len(a), len(order) if scatter else len(out))
    tiles = -(-rows // tile.block_m) * -(-width // tile.block_n)
    workers = processors(a.device) if num_processors is None else num_processors
    slots = part_slots(tiles, depth, workers, tile)
    partials = out.new_empty(slots * tile.block_m * tile.block_n, dtype=torch.float32) if slots else None
    shared = (bias, order, count, out)
    _launch(
        live_rows_product_kernel,
        tiles + slots,
        a,
        b,
        *shared,
        partials,
        width,
        writable,
        depth,
        padded_width(a),
        workers,
        slots,
        a.stride(0),
        b.stride(0),
        b.stride(1),
        out.stride(0),
        GATHER=gather,
        SCATTER=scatter,
        **tile.launch(a.dtype),
    )
    if partials is not None:
        cut, sizes = min(tiles, workers - 1), (width, writable, depth, workers, slots, out.stride(0))
        options = {"SCATTER": scatter, "ROWS": SUM_ROWS, "num_warps": tile.num_warps, **tile.blocks}
        _launch(live_rows_sum_kernel, cut * (tile.block_m // SUM_ROWS), partials, *shared, *sizes, **options)
    return out


def live_rows_outer(
    dz: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    *,
    gather_dz: bool = True,
    gather_x: bool = True,
    tile: Tile | None = None,
) -> torch.Tensor:
    """out += sum over i < count of dz[r]^T x[s], with r, s = order[i] where gathered, else i; returns `out`.

    dz [n, V] and x [n, H] of one type, float32, bfloat16 or float16; order int64 [>= count] of rows; count int32 [1] on
    the device; out float32 [V, H], contiguous. Columns of dz from V up to the next multiple of 16 may be read where the
    memory has them, and count for nothing. Summed in float32 in the order of i, the same in every run. `out` is read
    and written once per call, 8 V H bytes: worth some thousand rows a call.

    Raises:
        ValueError: types that differ or have no kernel, or shapes that do not fit.
    """
    _check_pair("dz", dz, "x", x)
    if out.dtype != torch.float32 or not out.is_contiguous() or out.shape != (dz.shape[1], x.shape[1]):
        wanted = f"contiguous float32 ({dz.shape[1]}, {x.shape[1]})"
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, expected {wanted}")
    _check_order(order, count)
    dz, x = _unit_stride(dz), _unit_stride(x)
    tile = tile or outer_tile(dz.dtype, architecture(dz.device))
    _launch(
        live_rows_outer_kernel,
        -(-out.shape[0] // tile.block_m) * -(-out.shape[1] // tile.block_n) if len(order) else 0,
        dz,
        x,
        order,
        count,
        out,
        out.shape[0],
        padded_width(dz),
        out.shape[1],
        dz.stride(0),
        x.stride(0),
        GATHER_DZ=gather_dz,
        GATHER_X=gather_x,
        SLICES=tile.slices,
        **tile.launch(dz.dtype),
    )
    return out


@lru_cache
def choose_splits(row_blocks: int, blocks: int, num_processors: int) -> int:
    """Shares of the vocabulary that finish soonest: fewest waves of programs times the length of a program.

    row_blocks and blocks: tiles along the rows and the vocabulary; one program occupies one of `num_processors`.
    """

    def duration(splits: int) -> float:
        return -(-row_blocks * splits // num_processors) * (-(-blocks // splits) + _SHARE_OVERHEAD)

    most = max(_MOST_SPLITS, -(-num_processors // max(1, row_blocks)))
    return min(range(min(_LEAST_SPLITS, blocks), min(most, blocks) + 1), key=duration)


def part_slots(tiles: int, depth: int, num_processors: int, tile: Tile) -> int:
    """Parts of tiles that a product over `depth` columns may keep in memory at once, 0 if it cuts none.

    A small depth gains less than the parts cost, and a single processor has no unfilled wave.
    """
    if not tiles or num_processors == 1 or depth <= PART_DEPTH:
        return 0
    return min(PART_WAVES * num_processors, PART_BYTES // (4 * tile.block_m * tile.block_n))


@lru_cache
def architecture(device: torch.device) -> int:
    """Compute capability times 10; 90 on the CPU, where the interpreter takes any tile."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device, 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(kernel: Any, programs: int, first: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of its first argument; an empty grid would be an error."""
    if programs:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *args, **constants)


def padded_width(matrix: torch.Tensor) -> int:
    """Columns up to the next multiple of 16, if the memory between the rows has them, else those of the matrix."""
    width = -(-matrix.shape[1] // 16) * 16
    end = matrix.storage_offset() + (len(matrix) - 1) * matrix.stride(0) + width
    exist = width <= matrix.stride(0) and end * matrix.element_size() <= matrix.untyped_storage().nbytes()
    return width if exist else matrix.shape[1]


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check_pair(left: str, left_value: torch.Tensor, right: str, right_value: torch.Tensor) -> None:
    if left_value.dtype != right_value.dtype:
        types = f"{left} is {left_value.dtype}, {right} {right_value.dtype}"
        raise ValueError(f"{types}; a product needs one type, convert one of them")


def _check_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _check_pair("a", a, "b", b)
    if a.shape[1] != b.shape[0] or out.shape[1] != b.shape[1]:
        shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}, out {tuple(out.shape)}"
        raise ValueError(f"{shapes} do not form [n, K] @ [K, N] into [m, N]; check the transposition of b")
    if out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}, the last must be 1; pass a contiguous tensor")


def _check_order(order: torch.Tensor, count: torch.Tensor) -> None:
    if order.dtype != torch.int64 or not order.is_contiguous():
        raise ValueError(f"order is {order.dtype} with strides {order.stride()}, expected contiguous int64 rows")
    if count.dtype != torch.int32 or count.numel() != 1:
        raise ValueError(f"count is {count.dtype} {tuple(count.shape)}, expected int32 (1,)")
