"""Live readings of memory: the GPU by nvidia-ml-py and torch, the process and the machine by /proc."""

from __future__ import annotations

import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30


def readings(device: torch.device | str) -> dict[str, float]:
    """Return readings named `memory/..._gib`; what cannot be read is left out, and nothing is raised.

    On CUDA: used, free and total of the whole GPU (nvidia-ml-py, else torch), and torch's allocated and reserved bytes
    at their peak since `reset_peaks`. Everywhere: the resident memory of this process now and at its peak.
    """
    device = torch.device(device)
    values = _process()
    if device.type == "cuda":
        values |= _gpu(device) | {
            "memory/torch_allocated_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/torch_reserved_peak_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return values


def reset_peaks(device: torch.device | str) -> None:
    """Let torch's peaks on a CUDA device start anew; does nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_bytes(device: torch.device | str, local_ranks: int = 1) -> int:
    """Memory to plan with: all of a CUDA device, or what the machine has available for each of `local_ranks`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return available_bytes() // local_ranks


def available_bytes() -> int:
    """Memory of the machine that processes can still take, a container's limit included (Linux)."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) << 10
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _process() -> dict[str, float]:
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1 << 10
    values = {"memory/process_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return values
    return values | {"memory/process_gib": pages * resource.getpagesize() / GIB}


def _gpu(device: torch.device) -> dict[str, float]:
    """The GPU's own numbers, which count other processes and the engine too."""
    index = torch.cuda.current_device() if device.index is None else device.index
    nvml = _nvml()
    try:
        if nvml is None:
            free, total = torch.cuda.mem_get_info(index)
        else:
            memory = nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, index))
            free, total = int(memory.free), int(memory.total)
    except Exception:  # a reading must not end a run: drivers refuse single questions on shared GPUs
        return {}
    names = ("memory/gpu_used_gib", "memory/gpu_free_gib", "memory/gpu_total_gib")
    return dict(zip(names, (value / GIB for value in (total - free, free, total)), strict=True))


@cache
def _nvml() -> Any:
    """The started library of nvidia-ml-py (extra "gpu"), or None."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
    except Exception:  # absent, or present without a driver
        return None
    return pynvml


def _handle(nvml: Any, index: int) -> Any:
    """The GPU that torch calls `index`: by its identity, since CUDA_VISIBLE_DEVICES renumbers them."""
    uuid = torch.cuda.get_device_properties(index).uuid
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
