"""Shape checks shared by the operators; they read metadata only and never wait for a device."""

from __future__ import annotations

import torch


def require_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` is None or has `shape`."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def require_matrix(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is a floating-point matrix."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def host_may_wait(tensor: torch.Tensor) -> bool:
    """Whether reading values of `tensor` in Python is free: on the CPU they are already there."""
    return tensor.device.type == "cpu"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half-precision inputs are never computed in half."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
