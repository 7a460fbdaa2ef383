"""The head kernels as `rows.py` and `counted.py` launch them, to be compiled without a GPU and held to bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from spear_kernels.compile_check import Production
from spear_kernels.linear_logprob.counted_kernel import (
    live_rows_outer_kernel,
    live_rows_product_kernel,
    live_rows_sum_kernel,
)
from spear_kernels.linear_logprob.kernel import fused_partials_kernel
from spear_kernels.linear_logprob.tile import SUM_ROWS, Tile, forward_tile, outer_tile, product_tile_of

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # float16 differs from bfloat16 in nothing here.
FORWARD = {
    "hidden": "*{}:16",
    "weight": "*{}:16",
    "ids": "*i64",
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
FORWARD_OPTIONS = {"bias": "*{}:16", "temperature": "*fp32"}
PRODUCT = {
    "a": "*{}:16",
    "b": "*{}:16",
    "order": "*i64",
    "count": "*i32",
    "out_width": "i32:16",
    "writable": "i32:16",
    "depth": "i32:16",
    "readable": "i32:16",
    "num_processors": "i32",
    "num_slots": "i32",
    "stride_a": "i32:16",
    "stride_out": "i32:16",
}
LOGITS = {**PRODUCT, "out": "*fp32:16", "stride_bn": "i32:16"}
HIDDEN = {**PRODUCT, "out": "*{}:16", "partials": "*fp32:16", "stride_bk": "i32:16"}
SUM = {
    "partials": "*fp32:16",
    "order": "*i64",
    "count": "*i32",
    "out": "*{}:16",
    "out_width": "i32:16",
    "writable": "i32:16",
    "depth": "i32:16",
    "num_processors": "i32",
    "num_slots": "i32",
    "stride_out": "i32:16",
}
OUTER = {
    "dz": "*{}:16",
    "x": "*{}:16",
    "order": "*i64",
    "count": "*i32",
    "out": "*fp32:16",
    "vocab": "i32:16",
    "readable": "i32:16",
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

    def production(
        self, name: str, kernel: Any, tile: Tile, signature: dict[str, str], bound: dict[str, int], **constants: Any
    ) -> Production:
        """`kernel` on this target; "{}" in a type of `signature` stands for the data type."""
        kind = TYPE_NAMES[self.dtype]
        return Production(
            name=f"{name}-{kind}{self.suffix}",
            kernel=kernel,
            signature={key: value.format(kind) for key, value in signature.items()},
            constants=constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_registers=255,
            max_spill_bytes=64,
            max_shared_bytes=self.max_shared_bytes,
            archs=self.archs,
            **bound,
        )

    def product(self, name: str, kernel: Any, tile: Tile, signature: dict[str, str], **constants: Any) -> Production:
        """`production` of a product whose operands come in copies of 16 bytes in every stage of the pipeline."""
        step = (tile.block_m + tile.block_n) * tile.block_k * self.dtype.itemsize
        copies = tile.num_stages * step // (16 * 32 * tile.num_warps)
        # A bias has one number for each thread.
        bound = {"min_async_copies": copies, "max_scalar_loads": 1 if "bias" in signature else 0}
        return self.production(name, kernel, tile, signature, bound, **tile.constants(self.dtype), **constants)


LOGITS_CONSTANTS = {"stride_bk": 1, "GATHER": False, "SCATTER": False, "partials": None}
HIDDEN_CONSTANTS = {"bias": None, "stride_bn": 1, "GATHER": True, "SCATTER": True}


def _usual(target: _Target) -> Iterator[Production]:
    """The leanest and the fullest forward, and the products of `counted.py` with a vocabulary that 16 divides."""
    dtype, arch = target.dtype, target.archs[0]
    forward, product, outer = forward_tile(dtype, arch), product_tile_of(dtype, arch), outer_tile(dtype, arch)
    lean = {"bias": None, "temperature": None, "HAS_SOFTCAP": False, "SLICES": forward.slices}
    full = {"HAS_SOFTCAP": True, "SLICES": forward.slices}
    sums = {"bias": None, "SCATTER": True, "ROWS": SUM_ROWS, **product.blocks}
    weight = {"GATHER_DZ": True, "GATHER_X": True, "SLICES": outer.slices}
    yield target.product("fused_partials-lean", fused_partials_kernel, forward, FORWARD, **lean)
    yield target.product("fused_partials-full", fused_partials_kernel, forward, FORWARD | FORWARD_OPTIONS, **full)
    kernel, name = live_rows_product_kernel, "live_rows_product"
    yield target.product(f"{name}-logits", kernel, product, LOGITS, bias=None, **LOGITS_CONSTANTS)
    yield target.product(f"{name}-hidden", kernel, product, HIDDEN, **HIDDEN_CONSTANTS)
    yield target.production("live_rows_sum", live_rows_sum_kernel, product, SUM, {}, **sums)
    yield target.product("live_rows_outer", live_rows_outer_kernel, outer, OUTER, **weight)


def _variants(target: _Target) -> Iterator[Production]:
    """A bias, a vocabulary that 16 does not divide, and a share of a vocabulary shard, which leaves in float32."""
    dtype, arch = target.dtype, target.archs[0]
    product, outer = product_tile_of(dtype, arch), outer_tile(dtype, arch)
    kernel, name = live_rows_product_kernel, "live_rows_product"
    odd_logits, odd_hidden = LOGITS | {"out_width": "i32"}, HIDDEN | {"depth": "i32"}
    odd_weight = {"GATHER_DZ": True, "GATHER_X": True, "SLICES": outer.slices}
    yield target.product(f"{name}-logits-bias", kernel, product, LOGITS | {"bias": "*{}:16"}, **LOGITS_CONSTANTS)
    yield target.product(f"{name}-logits-odd", kernel, product, odd_logits, bias=None, **LOGITS_CONSTANTS)
    yield target.product(f"{name}-hidden-odd", kernel, product, odd_hidden, **HIDDEN_CONSTANTS)
    yield target.product("live_rows_outer-odd", live_rows_outer_kernel, outer, OUTER | {"vocab": "i32"}, **odd_weight)
    if dtype != torch.float32:
        shard = HIDDEN | {"out": "*fp32:16"}
        yield target.product(f"{name}-hidden-shard", kernel, product, shard, **HIDDEN_CONSTANTS)


TARGETS = (
    _Target(torch.bfloat16, (90, 100), "", 200 << 10),
    _Target(torch.bfloat16, (80,), "-sm_80", 100 << 10),
    _Target(torch.bfloat16, (86, 89, 120), "-small", 50 << 10),
    _Target(torch.float32, (80, 86, 89, 90, 100, 120), "", 34 << 10),
)
# Variants change little, and each costs the tests a second: one of the architectures with mma.sync stands for all.
VARIANT_TARGETS = (*TARGETS[:2], replace(TARGETS[2], archs=(86,)), replace(TARGETS[3], archs=(86, 90)))
PRODUCTION = (
    *(production for target in TARGETS for production in _usual(target)),
    *(production for target in VARIANT_TARGETS for production in _variants(target)),
)
