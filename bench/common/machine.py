"""What a result file must say about where its numbers come from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spear-fast", "torch", "triton", "transformers", "tokenizers", "numpy", "reasoning-gym")


def describe_machine(packages: Iterable[str] = ()) -> dict[str, object]:
    """Return processor, cores, GPUs, Python, versions (also of `packages`) and commit.

    "+changes" marks an unclean tree. A copy of the tree without its history names its commit in BENCH_COMMIT.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": describe_gpus(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in (*PACKAGES, *packages)},
        "commit": os.environ.get("BENCH_COMMIT") or _commit(),
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Name, memory, clocks at this moment (MHz), power limit (W) and driver of each GPU.

    Needs nvidia-ml-py; without it only what torch knows. Empty where there is no GPU.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
    except Exception:  # absent, or present without a driver: both mean that it cannot tell
        return _gpus_of_torch()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [{**_describe_gpu(pynvml, handle), "driver": driver} for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _describe_gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    questions = {
        "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
        "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    answers: dict[str, Any] = {}
    for name, ask in questions.items():
        try:
            answers[name] = ask()
        except nvml.NVMLError as error:  # shared or virtual GPUs refuse single questions
            answers[name] = str(error)
    return answers


def _gpus_of_torch() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]


def result_folder() -> str:
    """Name of the folder under bench/results/ for this machine: that of its first GPU, or "cpu"."""
    gpus = describe_gpus()
    return re.sub(r"[^a-z0-9]+", "-", gpus[0]["name"].lower()).strip("-") if gpus else "cpu"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""
