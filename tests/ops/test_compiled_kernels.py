"""Every kernel as production launches it, compiled for three architectures: registers, spills, shared memory."""

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

from spear_kernels.compile_check import KERNEL_MODULES, Resources, all_productions, productions_of

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [(p.name, arch) for p in all_productions() for arch in p.archs]
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


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
    head = ("fused_partials", "live_rows")
    used = {entry["tensor_core"] for (name, _), entry in compiled().items() if name.startswith(head) and "fp32" in name}
    assert used == {""}


def test_no_kernel_is_compiled_again_for_another_number_of_rows():
    assert {entry["name"]: entry["specialised_counts"] for entry in compiled().values()} == {
        production.name: [] for production in all_productions()
    }


@pytest.mark.parametrize("bound", ["max_registers", "max_spill_bytes", "max_shared_bytes"])
def test_a_bound_that_is_too_low_is_reported(bound):
    production = all_productions()[0]
    used = Resources(registers=100, spill_bytes=8, shared_bytes=1024, tensor_core="")
    roomy = replace(production, max_registers=100, max_spill_bytes=8, max_shared_bytes=1024)
    assert used.violations(roomy, 90) == []
    assert len(used.violations(replace(roomy, **{bound: getattr(roomy, bound) - 1}), 90)) == 1


def test_shared_memory_beyond_the_architecture_is_reported_whatever_the_bound():
    roomy = replace(all_productions()[0], max_shared_bytes=1 << 30)
    used = Resources(registers=1, spill_bytes=0, shared_bytes=200 << 10, tensor_core="")
    assert used.violations(roomy, 90) == []
    assert used.violations(roomy, 80) == ["shared bytes 204800 > 166912"]
