"""Readings of memory: they follow what the process holds, and nothing is raised where a GPU's library is missing."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear_fast.memory import readings as module
from spear_fast.memory.readings import GIB, available_bytes, device_bytes, readings


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch as on a machine with two GPUs, of which the process sees one."""
    gpu = SimpleNamespace(uuid="abc")
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_properties": lambda index: gpu,
        "max_memory_allocated": lambda device: 3 * GIB,
        "max_memory_reserved": lambda device: 4 * GIB,
        "mem_get_info": lambda index: (5 * GIB, 8 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    module._nvml.cache_clear()
    yield
    module._nvml.cache_clear()


def test_the_process_is_read_on_the_cpu() -> None:
    size = 64 << 20
    before = readings("cpu")
    # Not a tensor: its allocator may hand out pages that an earlier one left resident.
    with mmap.mmap(-1, size) as held:
        held.write(b"1" * size)
        after = readings("cpu")
    assert after["memory/process_gib"] - before["memory/process_gib"] > 0.5 * size / GIB
    assert after["memory/process_peak_gib"] >= after["memory/process_gib"] * 0.99
    assert set(after) == {"memory/process_gib", "memory/process_peak_gib"}


def test_available_memory_is_shared_by_the_ranks_of_a_machine() -> None:
    assert 0 < device_bytes("cpu", local_ranks=4) <= available_bytes() // 3


def test_without_the_library_torch_answers(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    values = readings("cuda:0")
    assert values["memory/gpu_used_gib"] == 3 and values["memory/gpu_free_gib"] == 5
    assert values["memory/torch_allocated_peak_gib"] == 3 and values["memory/torch_reserved_peak_gib"] == 4


def test_with_the_library_the_gpu_is_found_by_its_identity(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-abc": "second"}[uuid],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=2 * GIB, total=9 * GIB, used=6 * GIB),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    values = readings("cuda")
    assert [values[f"memory/gpu_{name}_gib"] for name in ("used", "free", "total")] == [7, 2, 9]


def test_a_refused_question_ends_nothing(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uuid: str) -> None:
        raise RuntimeError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=refuse))
    values = readings("cuda")
    assert "memory/gpu_used_gib" not in values and "memory/torch_allocated_peak_gib" in values
