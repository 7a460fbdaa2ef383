"""Tests that need a CUDA device: collected where there is one and TRITON_INTERPRET=0, as bench/gpu_session.sh sets it.

SPEAR_GPU_TESTS_ON_CPU=1 runs them small, in Triton's interpreter, to see that they still work themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

REHEARSAL = os.environ.get("SPEAR_GPU_TESTS_ON_CPU") == "1" and not torch.cuda.is_available()
NATIVE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"

collect_ignore_glob = [] if NATIVE or REHEARSAL else ["test_*.py"]


@dataclass(frozen=True)
class Machine:
    """Where the tests run, and the head they run on: that of Qwen2.5-1.5B on a GPU."""

    device: str
    width: int
    vocab: int
    num_rows: int

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers, float32."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def ids(self, num_rows: int, vocab: int) -> torch.Tensor:
        """Token ids all over the vocabulary, the last one among them."""
        return torch.linspace(0, vocab - 1, num_rows, device=self.device).long()

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """An error for every operation that makes the host wait for the device."""
        if self.device == "cpu":
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The GPU at real sizes, or the CPU at sizes for a rehearsal."""
    return Machine("cpu", 24, 517, 40) if REHEARSAL else Machine("cuda", 1536, 151936, 256)
