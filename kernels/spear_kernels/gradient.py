"""An autograd node for losses whose gradient is already known in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _PrecomputedGradient(torch.autograd.Function):
    """Identity on `value`; the second half of `tensors` are the gradients of the first half."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        half = len(tensors) // 2
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:half]]
        ctx.save_for_backward(*tensors[half:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The product stays on the device, and in the wider type until after it: no host sync, one rounding.
        scaled = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, *scaled, *(None for _ in scaled))


def attach_gradient(
    value: torch.Tensor, inputs: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Return 0-d `value` as a function of `inputs` whose derivative in inputs[i] is gradients[i] (None: zero)."""
    return _PrecomputedGradient.apply(value, *inputs, *gradients)
