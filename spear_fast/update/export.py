"""Weights that leave the trainer, under Hugging Face's names: to an engine, or as a folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from .lora import is_adapter, merged_weight, plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters by their names in the model without wrappers, adapters merged, a tied head left out.

    Sharded ones come as DTensor of the master weights; all ranks must go through all of them.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        layer, _, leaf = name.rpartition(".base_layer.")
        tensor = merged_weight(model.get_submodule(layer)) if layer and leaf == "weight" else parameter.detach()
        yield plain_name(name), tensor


def save_full(model: PreTrainedModel, folder: Path, *, main: bool, dtype: torch.dtype | None) -> None:
    """Write the exported parameters as a Hugging Face folder, in `dtype` (None: as they are).

    All ranks gather, tensor by tensor; the `main` one keeps them, on the CPU, and writes.
    """
    gathered = {}
    for name, tensor in export_parameters(model):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if main:
            gathered[name] = full.to("cpu", dtype or full.dtype)
    if not main:
        return
    family: Any = type(model)
    with torch.device("meta"):
        bare = family(copy.deepcopy(model.config)).to(next(iter(gathered.values())).dtype)
    bare.generation_config = model.generation_config
    bare.save_pretrained(folder, state_dict=gathered)
