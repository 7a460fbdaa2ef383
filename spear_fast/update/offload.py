"""The trainer's tensors to the memory of the CPU while the engine needs the GPU, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .model import PackedModel
    from .optimizer import Optimizer


def offload(policy: PackedModel, optimizer: Optimizer) -> None:
    """Move master weights and the optimizer's moments to the CPU; nothing can be computed until `onload`.

    Between steps only, when there are no gradients. Nothing happens with parallel.cpu_offload, where they are there.
    """
    if not policy.rests_on_cpu:
        move(policy, optimizer, lambda tensor: tensor.to("cpu"))


def onload(policy: PackedModel, optimizer: Optimizer, device: torch.device) -> None:
    """Move back to `device` what `offload` moved away from it."""
    if not policy.rests_on_cpu:
        move(policy, optimizer, lambda tensor: tensor.to(device))


@torch.no_grad()
def move(policy: PackedModel, optimizer: Optimizer, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace parameters, buffers and moments by `to(each)`, sharded ones as DTensor; parameter objects stay."""
    policy.free_gathered()
    policy.root._apply(to)
    for state in optimizer.torch_optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = to(value)
