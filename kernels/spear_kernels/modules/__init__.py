"""Modules for trainers that exist: a head for transformers models and a class with Liger's call."""

from __future__ import annotations

from spear_kernels.modules.head import PolicyHead, replace_lm_head, restore_lm_head
from spear_kernels.modules.inputs import PolicyInputs, PolicyOutput

__all__ = ["PolicyHead", "PolicyInputs", "PolicyOutput", "replace_lm_head", "restore_lm_head"]
