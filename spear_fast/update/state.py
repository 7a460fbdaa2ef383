"""What a training run must keep of policy and optimizer: master weights and moments, as named tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .model import PackedModel
    from .optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def training_tensors(policy: PackedModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Master weights `weight.<name>` and AdamW's moments `exp_avg.<name>`, `exp_avg_sq.<name>`.

    They are the live tensors, sharded ones as DTensor: to be saved, or to be filled in place by a load. Moments that
    do not exist yet are made, as zeros.
    """
    policy.free_gathered()
    adamw = optimizer.torch_optimizer
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = adamw.state[parameter]
        if not state:
            # The count of steps is the optimizer's own number, put in by `set_steps`.
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
