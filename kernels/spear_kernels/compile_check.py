"""Compile the kernels' production configurations without a GPU and read what the machine code needs.

Triton reaches cubins on any machine, so registers, spills and shared memory can be held to bounds in a test. Only a
process in which TRITON_INTERPRET was not set when Triton was imported can compile.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

KERNEL_MODULES = (
    "spear_kernels.logprob.kernel",
    "spear_kernels.linear_logprob.productions",
    "spear_kernels.linear_policy_loss.kernel",
    "spear_kernels.policy_loss.kernel",
)
ARCHITECTURES = (80, 90, 100)
# Most shared memory that a block may ask for, by compute capability (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Longest name first: "tcgen05.mma" must not be taken for "mma".
TENSOR_CORE_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")

ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10")
SCALAR_LOAD = re.compile(r"ld\.global[.\w:]*\.[bu]16\b")


@dataclass(frozen=True)
class Production:
    """A kernel as production launches it, with the bounds its machine code must keep on every architecture in `archs`.

    signature maps every runtime argument to its Triton type in the order of the kernel's parameters; a suffix ":16"
    says what launches see and specialise on: a pointer aligned to, or an integer divisible by, 16. Integers named in
    do_not_specialize never carry it. constants holds constexprs, pointers that are None, and integers equal to 1.
    """

    name: str  # unique, readable; the id of its tests
    kernel: Any  # the triton.jit function
    signature: dict[str, str]  # e.g. {"logits": "*bf16:16", "num_rows": "i32", "vocab": "i32:16"}
    constants: dict[str, Any]  # every parameter that the signature lacks
    num_warps: int
    num_stages: int
    max_registers: int  # per thread
    max_spill_bytes: int  # stack per thread
    max_shared_bytes: int  # per block
    archs: tuple[int, ...] = ARCHITECTURES  # compute capabilities times 10 that launches use this configuration on
    min_async_copies: int = 0  # 16-byte copies to shared memory in the code of one thread
    max_scalar_loads: int | None = None  # 16-bit loads in the code of one thread; None: not held


@dataclass(frozen=True)
class Resources:
    """What one block or thread of a compiled kernel needs."""

    registers: int  # per thread
    spill_bytes: int  # stack per thread; Triton kernels have no other use for a stack
    shared_bytes: int  # per block, dynamic
    tensor_core: str  # the PTX instruction of its matrix products, "" if it has none
    async_copies: int  # instructions that copy 16 bytes to shared memory while the thread goes on
    scalar_loads: int  # instructions that load 16 bits: half-precision numbers one at a time

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether matrix products run on tensor cores."""
        return bool(self.tensor_core)

    def violations(self, production: Production, arch: int) -> list[str]:
        """The bounds of `production`, and the limit of the architecture, that these resources break."""
        shared, most_scalar = min(production.max_shared_bytes, SHARED_LIMIT[arch]), production.max_scalar_loads
        bounds = (
            ("registers", self.registers, production.max_registers),
            ("spill bytes", self.spill_bytes, production.max_spill_bytes),
            ("shared bytes", self.shared_bytes, shared),
            ("scalar loads", self.scalar_loads, self.scalar_loads if most_scalar is None else most_scalar),
        )
        broken = [f"{what} {used} > {bound}" for what, used, bound in bounds if used > bound]
        if self.async_copies < production.min_async_copies:
            broken.append(f"asynchronous copies {self.async_copies} < {production.min_async_copies}")
        return broken


def compile_for(production: Production, arch: int) -> Resources:
    """Compile for compute capability arch / 10, e.g. 90.

    Raises:
        ValueError: the kernel is an interpreted one, or its parameters do not match signature and constants.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": production.num_warps, "num_stages": production.num_stages}
    compiled = triton.compile(_source(production), target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(registers, stack, compiled.metadata.shared, tensor_core_instruction(ptx), *loads_of(ptx))


def _source(production: Production) -> Any:
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kernel = production.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"kernel={kernel} of {production.name} cannot be compiled; unset TRITON_INTERPRET")
    names = kernel.arg_names
    given = [*production.signature, *production.constants]
    if sorted(given) != sorted(names):
        differing = sorted(set(given) ^ set(names)) or "a name in both"
        raise ValueError(f"signature and constants of {production.name} do not match {names}: {differing}")
    types = {name: production.signature.get(name, "constexpr") for name in names}
    aligned = [index for index, name in enumerate(names) if types[name].endswith(":16")]
    return ASTSource(
        kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=production.constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )


def specialised_counts(kernel: Any) -> list[str]:
    """Counts (arguments named num_*) of a triton.jit function whose value would decide what is compiled."""
    return [p.name for p in kernel.params if p.name.startswith("num_") and not (p.is_constexpr or p.do_not_specialize)]


def specialised_alignments(kernel: Any) -> list[str]:
    """Arguments of a triton.jit function whose alignment, or divisibility by 16, would decide what is compiled."""
    seen = (p for p in kernel.params if not (p.is_constexpr or p.do_not_specialize or p.do_not_specialize_on_alignment))
    return [p.name for p in seen]


def unseen_alignments(production: Production) -> list[str]:
    """Arguments that `production` says are aligned, though no launch lets the compiler see it."""
    seen = specialised_alignments(production.kernel)
    return [name for name, kind in production.signature.items() if kind.endswith(":16") and name not in seen]


def tensor_core_instruction(ptx: str) -> str:
    """The tensor-core instruction that PTX text contains, "" if none."""
    return next((name for name in TENSOR_CORE_INSTRUCTIONS if name in ptx), "")


def loads_of(ptx: str) -> tuple[int, int]:
    """How many asynchronous copies of 16 bytes to shared memory, and how many 16-bit loads, PTX text contains."""
    return len(ASYNC_COPY.findall(ptx)), len(SCALAR_LOAD.findall(ptx))


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


def productions_of(module: str) -> tuple[Production, ...]:
    """The tuple PRODUCTION of a kernel module."""
    return importlib.import_module(module).PRODUCTION


def all_productions() -> tuple[Production, ...]:
    """Every production configuration of the library."""
    return tuple(production for module in KERNEL_MODULES for production in productions_of(module))


def _compile_named(job: tuple[str, int]) -> dict[str, Any]:
    name, arch = job
    production = next(p for p in all_productions() if p.name == name)
    resources = compile_for(production, arch)
    return {
        "name": name,
        "arch": arch,
        **asdict(resources),
        "num_warps": production.num_warps,
        "num_stages": production.num_stages,
        "violations": resources.violations(production, arch),
        "specialised_counts": specialised_counts(production.kernel),
        "specialised_alignments": specialised_alignments(production.kernel),
        "unseen_alignments": unseen_alignments(production),
    }


def compile_all(names: Iterable[str] | None = None, workers: int = 2) -> list[dict[str, Any]]:
    """Compile the named configurations (all) for each of their architectures, in `workers` processes.

    Returns one dictionary per pair with name, arch, the fields of `Resources`, num_warps, num_stages, violations,
    specialised_counts, specialised_alignments and unseen_alignments.
    """
    wanted = None if names is None else set(names)
    jobs = [(p.name, arch) for p in all_productions() if wanted is None or p.name in wanted for arch in p.archs]
    # Fresh processes: a forked one would inherit the locks of whatever threads the caller runs.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_named, jobs))


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1:] or None)))
