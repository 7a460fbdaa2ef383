"""Every kernel as production launches it, compiled for the architectures: registers, spills, memory, loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from spear_kernels.compile_check import KERNEL_MODULES, Resources, all_productions, loads_of, productions_of

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [(p.name, arch) for p in all_productions() for arch in p.archs]
TENSOR_CORE = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}
HEAD = ("fused_partials", "live_rows")
# Values of rows, of which a chunk of rows is a slice with any alignment, and counts computed on the device.
PER_ROW = {"ids", "temperature", "order", "count"}
FRUGAL = Resources(registers=1, spill_bytes=0, shared_bytes=0, tensor_core="", async_copies=0, scalar_loads=0)


@lru_cache
def compiled() -> dict[tuple[str, int], dict[str, Any]]:
    """What a process without the interpreter reports, by name and architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-m", "spear_kernels.compile_check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {(entry["name"], entry["arch"]): entry for entry in json.loads(done.stdout)}


@pytest.mark.parametrize(("name", "arch"), PAIRS, ids=[f"{name}-on-sm_{arch}" for name, arch in PAIRS])
def test_machine_code_keeps_its_bounds(name, arch):
    assert compiled()[name, arch]["violations"] == []


def test_names_are_unique_and_every_kernel_module_has_some():
    names = [production.name for production in all_productions()]
    assert len(names) == len(set(names))
    assert all(productions_of(module) for module in KERNEL_MODULES)


@pytest.mark.parametrize("kernel", ["fused_partials", "live_rows_product", "live_rows_outer"])
@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_half_precision_head_runs_on_the_tensor_cores_of_the_architecture(kernel, arch):
    used = {
        entry["tensor_core"]
        for (name, at), entry in compiled().items()
        if name.startswith(kernel) and "bf16" in name and at == arch
    }
    assert used == {TENSOR_CORE[arch]}


def test_float32_products_are_not_rounded_to_the_types_of_tensor_cores():
    used = {entry["tensor_core"] for (name, _), entry in compiled().items() if name.startswith(HEAD) and "fp32" in name}
    assert used == {""}


def test_no_kernel_is_compiled_again_for_another_number_of_rows():
    assert {entry["name"]: entry["specialised_counts"] for entry in compiled().values()} == {
        production.name: [] for production in all_productions()
    }


def test_no_head_kernel_is_compiled_again_for_rows_at_another_address():
    seen = {name: set(entry["specialised_alignments"]) for (name, _), entry in compiled().items()}
    head = {name: arguments & PER_ROW for name, arguments in seen.items() if name.startswith(HEAD)}
    assert head == {name: set() for name in head}


def test_no_production_is_compiled_with_an_alignment_that_its_launches_do_not_see():
    unseen = {entry["name"]: entry["unseen_alignments"] for entry in compiled().values() if entry["unseen_alignments"]}
    assert unseen == {}


def test_every_product_of_the_head_is_held_to_vector_loads_with_a_vocabulary_that_16_does_not_divide():
    held = {production.name for production in all_productions() if production.max_scalar_loads == 0}
    for kernel in ("live_rows_product-logits-odd", "live_rows_product-hidden-odd", "live_rows_outer-odd"):
        for target in ("bf16", "bf16-sm_80", "bf16-small", "fp32"):
            assert f"{kernel}-{target}" in held


@pytest.mark.parametrize("bound", ["max_registers", "max_spill_bytes", "max_shared_bytes", "max_scalar_loads"])
def test_a_bound_that_is_too_low_is_reported(bound):
    production = all_productions()[0]
    used = replace(FRUGAL, registers=100, spill_bytes=8, shared_bytes=1024, scalar_loads=2)
    roomy = replace(production, max_registers=100, max_spill_bytes=8, max_shared_bytes=1024, max_scalar_loads=2)
    assert used.violations(roomy, 90) == []
    assert len(used.violations(replace(roomy, **{bound: getattr(roomy, bound) - 1}), 90)) == 1


def test_loads_are_counted_in_the_code_and_missing_copies_reported():
    lines = (
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;",
        "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;",
        "@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];",
        "ld.global.L1::evict_last.b16 %rs1, [ %rd1 ];",
        "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];",
        "st.global.b16 [ %rd1 ], %rs1;",
    )
    assert loads_of("\n".join(lines)) == (2, 2)
    production = replace(all_productions()[0], min_async_copies=3, max_scalar_loads=None)
    assert replace(FRUGAL, async_copies=3).violations(production, 90) == []
    assert replace(FRUGAL, async_copies=2).violations(production, 90) == ["asynchronous copies 2 < 3"]


def test_shared_memory_beyond_the_architecture_is_reported_whatever_the_bound():
    roomy = replace(all_productions()[0], max_shared_bytes=1 << 30)
    used = replace(FRUGAL, shared_bytes=200 << 10)
    assert used.violations(roomy, 90) == []
    assert used.violations(roomy, 80) == ["shared bytes 204800 > 166912"]
