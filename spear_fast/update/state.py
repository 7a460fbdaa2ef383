"""What a training run must keep of policy and optimizer: master weights and moments, as named tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .optimizer import Optimizer

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put into parameters' names."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by names that do not depend on how the model is wrapped."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name


def training_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Master weights `weight.<name>` and AdamW's moments `exp_avg.<name>`, `exp_avg_sq.<name>`.

    They are the live tensors, sharded ones as DTensor: to be saved, or to be filled in place by a load. Moments that
    do not exist yet are made, as zeros.
    """
    adamw = optimizer.torch_optimizer
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        state = adamw.state[parameter]
        if not state:
            # The count of steps is the optimizer's own number, put in by `Optimizer.set_steps`.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    return tensors


def set_steps(optimizer: Optimizer, num_steps: int) -> None:
    """Let the optimizer go on from `num_steps` steps taken, after its moments were filled."""
    optimizer.num_steps = num_steps
    for state in optimizer.torch_optimizer.state.values():
        state["step"].fill_(num_steps)
