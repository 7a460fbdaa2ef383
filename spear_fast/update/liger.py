"""Liger's RMSNorm, RoPE and SwiGLU in a loaded model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from spear_fast.errors import ConfigError, MissingDependencyError


def use_liger(model: nn.Module, setting: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Patch Liger's kernels into a loaded model if the setting and this machine say so; return whether it was done.

    Its head is left alone, since the trainer has its own. Liger replaces functions of transformers' module for the
    whole process. "auto" takes it on CUDA where it is installed and knows the model. Call it before
    `sharding.shard`.

    Raises:
        MissingDependencyError: "on", and liger-kernel is not installed.
        ConfigError: "on", and it does not know the model or there is no GPU for its kernels.
    """
    if setting == "off" or (setting == "auto" and (device.type != "cuda" or find_spec("liger_kernel") is None)):
        return False
    if find_spec("liger_kernel") is None:
        raise MissingDependencyError("liger-kernel", "liger", "model.liger=on")
    if device.type != "cuda":
        raise ConfigError(f"model.liger=on needs CUDA, and the policy is on {device}; set model.liger=auto")
    return _patch(model, must=setting == "on")


def _patch(model: Any, *, must: bool) -> bool:
    from liger_kernel.transformers import monkey_patch

    family = model.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        if must:
            raise ConfigError(f"model.liger=on, but Liger has no kernels for {family!r} models; set model.liger=off")
        return False
    monkey_patch._apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, geglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return True
