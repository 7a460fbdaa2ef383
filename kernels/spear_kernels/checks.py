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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without making the host wait for work that the device has not done yet."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        # A copy from memory that is not page-locked would wait.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def integers(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Token ids as int64 on `device`; raise ValueError unless they are integers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype}, but token ids are integers; pass int64 or int32")
    return to_device(ids, device).long()


def refuse_second_derivatives(name: str) -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivatives; call backward without create_graph=True")


def require_ids(ids: torch.Tensor, vocab_size: int | None) -> None:
    """Raise ValueError if an id [N] is none of 0..vocab_size-1; on devices, where looking would wait, do nothing.

    vocab_size None: nobody knows how many there are.
    """
    if vocab_size is None or not host_may_wait(ids) or len(ids) == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"ids hold {wrong}, but must be between 0 and {vocab_size - 1}; leave out or mask such rows")
