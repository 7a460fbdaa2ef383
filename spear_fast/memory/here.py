"""The memory plan of this process: on its own device, beside the other ranks of its machine."""

from __future__ import annotations

import os

import torch

from spear_fast.config.schema import RunConfig

from .plan import MemoryPlan, plan_memory
from .readings import available_bytes, device_bytes
from .shapes import ModelShape


def plan_here(shape: ModelShape, config: RunConfig, num_ranks: int, device: torch.device) -> MemoryPlan:
    """Return the plan for the device of this rank, one of `num_ranks`; call it before weights are loaded.

    torchrun's LOCAL_WORLD_SIZE says how many ranks share the memory of this machine. Raises as `plan_memory`.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = device.type == "cpu"
    return plan_memory(
        shape,
        config,
        num_ranks,
        device_bytes(device, local_ranks),
        host_bytes=None if on_cpu else available_bytes() // local_ranks,
        on_cpu=on_cpu,
    )
