"""Which implementation of an operator runs: resolved in one place, never by silent fallback."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("auto", "torch", "triton")
# Read once: looking them up inside an operator would break a compiled graph. Triton itself reads the variable when a
# kernel is defined, so a later change would have no effect either.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, *tensors: torch.Tensor | None) -> str:
    """Return "torch" or "triton": what "auto", "torch" or "triton" means for these tensors.

    "auto" is "triton" for CUDA tensors of at most 32 bits when triton is installed, else "torch". On the CPU
    "triton" runs in Triton's interpreter, which is there to test kernels, and has to be asked for.

    Raises:
        ValueError: unknown name, or "triton" where it cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return "torch"
    obstacle = _obstacle([tensor for tensor in tensors if tensor is not None], INTERPRETED and backend == "triton")
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run here: {obstacle}; use backend='torch' or 'auto'")
    return "torch"


def _obstacle(tensors: list[torch.Tensor], interpreted: bool) -> str | None:
    """Why Triton kernels cannot take these tensors, or None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the kernels compute in float32 and a tensor is float64"
    if not interpreted and not all(tensor.is_cuda for tensor in tensors):
        return "a tensor is not on a CUDA device (on the CPU, set TRITON_INTERPRET=1 before importing to test)"
    return None
