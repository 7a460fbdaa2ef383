"""Memory of a device while something runs: its peak, and what stays used."""

from __future__ import annotations

import gc
import threading

import torch

from spear_fast.memory.readings import readings

PERIOD_S = 0.02


class PeakWatch:
    """Largest memory in use inside the `with` block, sampled: of the whole GPU, or resident in this process.

    torch's own peaks do not tell: they count memory of the engine that sleeps, and not what other processes hold.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak_gib = 0.0
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._read()

    def _read(self) -> None:
        self.peak_gib = max(self.peak_gib, _used_gib(self._device))


def settled_bytes(device: torch.device) -> int:
    """Bytes in use once torch has given back what it only caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return int(_used_gib(device) * 2**30)


def _used_gib(device: torch.device) -> float:
    values = readings(device)
    return values["memory/gpu_used_gib" if device.type == "cuda" else "memory/process_gib"]
