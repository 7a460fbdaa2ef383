"""Autocast: the inputs of a head follow it as those of a linear layer do, the operators' own arithmetic does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def autocast_inputs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inputs of a head in the type of autocast where it is on, differentiably, as a linear layer takes them.

    float64 is left alone, as there.
    """
    if not torch.is_autocast_enabled(hidden.device.type) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run an operator, whose first argument is a tensor, with autocast off: its products must not be rounded."""

    @wraps(function)
    def plain(first: torch.Tensor, *rest: Any) -> Result:
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return function(first, *rest)
        with torch.autocast(device_type, enabled=False):
            return function(first, *rest)

    return plain
