"""The attention back-ends that work on this device, with shared prompts and windows, against float64."""

from __future__ import annotations

import pytest
import torch

from spear_fast.errors import ConfigError
from spear_fast.types import Segments
from spear_fast.update.attention import choose_attention, packed_attention, plan_attention

HEAD_DIM = 64
SEGMENTS = Segments.of([300, 140, 3, 130, 61, 17, 512, 1], [-1, 0, 0, -1, -1, 4, -1, 6])
"""Prompts with rests behind them and whole sequences, in and across blocks of 128 tokens."""


def works(backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        return choose_attention(backend, device, dtype, HEAD_DIM) == backend
    except ConfigError:
        return False


def output_and_gradients(tensors, backend, device, window):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = packed_attention(*leaves, plan_attention(SEGMENTS, device, backend), None, window)
    weight = torch.linspace(-1, 1, output.numel(), device=device, dtype=torch.float64).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_ends_equal_float64(machine, dtype, window):
    num_tokens = int(SEGMENTS.length.sum())
    tensors = [machine.normal(num_tokens, heads, HEAD_DIM, seed=heads).to(dtype) for heads in (4, 2)]
    tensors.append(tensors[1].flip(0))
    exact = output_and_gradients([tensor.double() for tensor in tensors], "sdpa", machine.device, window)
    backends = [name for name in ("flash", "flex", "sdpa") if works(name, machine.device, dtype)]
    assert "sdpa" in backends and (machine.device == "cpu" or "flex" in backends)
    for backend in backends:
        for actual, truth in zip(output_and_gradients(tensors, backend, machine.device, window), exact, strict=True):
            gap = (actual.double() - truth).norm() / truth.norm()
            assert gap < (2e-2 if dtype == torch.bfloat16 else 1e-3), f"{backend}: {gap}"
