"""How the products of the linear head are cut into tiles, by data type and compute capability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Row blocks that run side by side, so that they share the tiles of the other operand through the L2 cache.
GROUP = 8
# A product over a large depth is cut along it where its tiles fill no wave of programs. By arithmetic, not measured: a
# part costs as much as 16 steps beside its own (filling the pipeline, 128 KiB written and read again), and parts for
# more than three waves would take more memory than they save time.
PART_OVERHEAD, PART_WAVES = 16, 3
PART_DEPTH = 16384
"""Products over no more columns than that stay uncut: the width of every hidden state, no large vocabulary."""
PART_BYTES = 64 << 20
"""Most memory that the parts of a product may take."""
SUM_ROWS = 16
"""Rows that one program of the sum of parts takes, a divisor of every block of rows."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut: the block [m, n] of one program, the depth k of one step, and what it runs on."""

    block_m: int
    block_n: int
    block_k: int
    slices: int  # parts of the columns that the work after the product takes one at a time
    num_warps: int
    num_stages: int  # steps whose operands are under way or in use at once

    def launch(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of a launch, without slices; float32 products are exact, not rounded to tf32."""
        return {**self.constants(dtype), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The constexprs that every product kernel shares."""
        return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", **self.blocks}

    @property
    def blocks(self) -> dict[str, int]:
        """The constexprs that say which tile is where."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": GROUP}


FLOAT32_TILE = Tile(128, 128, 16, 4, 8, 3)
HOPPER_TILE = Tile(128, 256, 64, 4, 8, 4)  # 192 KiB of the 227
# Compute capability 8.0 has 163 KiB; its accumulators share the registers with the operands, so tiles are smaller.
AMPERE_FORWARD_TILE = Tile(128, 128, 64, 4, 8, 4)
AMPERE_PRODUCT_TILE = Tile(128, 256, 32, 4, 8, 4)
SMALL_TILE = Tile(128, 128, 32, 4, 8, 3)  # 48 KiB: fits the 99 KiB of compute capabilities 8.6, 8.9 and 12
LARGE_SHARED_MEMORY = (90, 100, 103)


def forward_tile(dtype: torch.dtype, arch: int) -> Tile:
    """The tile of `fused_partials_kernel` for inputs of `dtype` on compute capability arch / 10."""
    return _tile(dtype, arch, AMPERE_FORWARD_TILE)


def product_tile_of(dtype: torch.dtype, arch: int) -> Tile:
    """The tile of `live_rows_product_kernel`."""
    return _tile(dtype, arch, AMPERE_PRODUCT_TILE)


def outer_tile(dtype: torch.dtype, arch: int) -> Tile:
    """The tile of `live_rows_outer_kernel`."""
    return _tile(dtype, arch, AMPERE_FORWARD_TILE)


def _tile(dtype: torch.dtype, arch: int, ampere: Tile) -> Tile:
    if dtype == torch.float32:
        return FLOAT32_TILE
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype} has no Triton head kernel; use float32, bfloat16 or float16, or backend='torch'"
        )
    if arch in LARGE_SHARED_MEMORY:
        return HOPPER_TILE
    return ampere if arch == 80 else SMALL_TILE
