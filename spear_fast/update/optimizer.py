"""AdamW with gradient clipping and a learning rate that follows the count of steps taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from spear_fast.schedules import linear_warmup, warmup_cosine


@dataclass(frozen=True)
class OptimizerSettings:
    """Numbers of AdamW and its schedule, e.g. `OptimizerSettings(lr=1e-6, warmup_steps=10)`."""

    lr: float
    """Learning rate after warm-up."""
    warmup_steps: int = 0
    """Linear warm-up, in optimizer steps."""
    total_steps: int | None = None
    """Optimizer steps after which a cosine has brought the rate to 0; None keeps it constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Applied to matrices only; norms and biases never decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if self.total_steps is None:
            return self.lr * linear_warmup(step, self.warmup_steps)
        return self.lr * warmup_cosine(step, self.warmup_steps, self.total_steps)


class Optimizer:
    """AdamW over the parameters that want gradients. A step never taken leaves no trace in its state.

    Sharding replaces parameters, so make it after `sharding.shard`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> None:
        self.settings = settings
        self.num_steps = 0
        """Steps taken, which place the next one on the schedule."""
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self._parameters if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.torch_optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, fused=True
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.settings.learning_rate(self.num_steps)

    def clip_gradients(self) -> torch.Tensor:
        """Scale gradients to a global norm of at most `grad_clip`; return the norm before that, 0-d, without a sync.

        Of sharded gradients it is the norm over all ranks.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.grad_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        """Take one step with the gradients as they are, and drop them."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = self.lr
        self.torch_optimizer.step()
        self.num_steps += 1
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.torch_optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments and the count of steps: tensors, numbers, lists and dicts only."""
        return {"adamw": self.torch_optimizer.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an optimizer over the same parameters."""
        self.torch_optimizer.load_state_dict(state["adamw"])
        self.num_steps = state["num_steps"]
