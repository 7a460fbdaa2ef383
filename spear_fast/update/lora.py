"""Low-rank adapters through peft: put into a model, and merged into the weights that leave the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from spear_fast.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name of the only set of adapters."""


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put adapters of this rank into the linear layers called `targets` and freeze all other weights, in place.

    They add alpha / rank * B A to a weight, and nothing at first, since B starts at 0. `seed` draws A; the global
    random state is left as it was. Call it before `sharding.shard`.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: The model has no linear layer of some name beside its head, or `targets` is empty.
    """
    if find_spec("peft") is None:
        raise MissingDependencyError("peft", "lora", f"model.lora.rank={rank}")
    from peft import LoraConfig, inject_adapter_in_model

    linear = {
        name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    # The head is one weight with the embedding where they are tied, and the loss reads it as a plain tensor.
    there = {name for name, module in linear.items() if module is not model.get_output_embeddings()}
    missing = [target for target in targets if target not in there]
    if missing or not targets:
        raise ConfigError(
            f"model.lora.targets={list(targets)}: {type(model).__name__} has no linear layer called {missing}; "
            f"choose from {sorted(there)}"
        )
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """W + alpha / rank * B A of a layer with adapters, computed in float32, in W's type; W itself stays as it is.

    Of a sharded layer each rank adds to its rows of W; only the small A is gathered.
    """
    base, up = layer.base_layer.weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    down, scale = layer.lora_A[ADAPTER].weight.detach(), layer.scaling[ADAPTER]
    if not isinstance(base, DTensor):
        return _sum(base, up, down, scale)
    rows = _sum(base.to_local(), up.to_local(), down.full_tensor(), scale)
    return DTensor.from_local(
        rows, base.device_mesh, base.placements, run_check=False, shape=base.shape, stride=base.stride()
    )


def _sum(base: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    return base.float().addmm(up.float(), down.float(), alpha=scale).to(base.dtype)
