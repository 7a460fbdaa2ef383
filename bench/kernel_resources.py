"""What the machine code of every production kernel needs, without a GPU: registers, spills, shared memory, loads.

python bench/kernel_resources.py --out bench/results/compile/kernels.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.machine import ROOT, describe_machine
from bench.common.result_file import write_json
from spear_kernels.compile_check import compile_all

HEADER = (
    "kernel",
    "arch",
    "registers",
    "spill bytes",
    "shared KiB",
    "warps",
    "stages",
    "tensor-core instruction",
    "16-byte async copies",
    "16-bit loads",
)


def main() -> None:
    """Compile, print a Markdown table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/compile/kernels.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    args = parser.parse_args()
    # The processes that compile import Triton anew and must not get its interpreter.
    os.environ.pop("TRITON_INTERPRET", None)
    machine, kernels = describe_machine(), compile_all(workers=args.workers)
    for kernel in kernels:
        # A list of nearly all arguments, for the tests.
        del kernel["specialised_alignments"]
    write_json({"machine": machine, "kernels": kernels}, args.out)
    print(table(kernels))
    broken = [f"{k['name']} on sm_{k['arch']}: {', '.join(k['violations'])}" for k in kernels if k["violations"]]
    if broken:
        sys.exit("beyond the stated bounds: " + "; ".join(broken))


def table(kernels: list[dict[str, Any]]) -> str:
    """Markdown with one row for each kernel and architecture."""
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, kernels)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(kernel: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"`{kernel['name']}`",
        f"sm_{kernel['arch']}",
        str(kernel["registers"]),
        str(kernel["spill_bytes"]),
        f"{kernel['shared_bytes'] / 1024:.0f}",
        str(kernel["num_warps"]),
        str(kernel["num_stages"]),
        kernel["tensor_core"] or "none",
        str(kernel["async_copies"]),
        str(kernel["scalar_loads"]),
    )


if __name__ == "__main__":
    main()
