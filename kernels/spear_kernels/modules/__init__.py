"""Modules for trainers that exist: a head for transformers models and a class with Liger's call."""

from __future__ import annotations

from spear_kernels.modules.head import PolicyHead, replace_lm_head, restore_lm_head
from spear_kernels.modules.inputs import PolicyInputs, PolicyOutput
from spear_kernels.modules.liger import FusedLinearGRPOLoss

__all__ = ["FusedLinearGRPOLoss", "PolicyHead", "PolicyInputs", "PolicyOutput", "replace_lm_head", "restore_lm_head"]
