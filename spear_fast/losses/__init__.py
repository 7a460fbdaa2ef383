"""Losses: what enters them and which coefficients an algorithm means; the maths is in spear_kernels."""

from __future__ import annotations

from .filters import keep_top_groups, mark_filtered
from .terms import on_policy_terms, replay_terms

__all__ = ["keep_top_groups", "mark_filtered", "on_policy_terms", "replay_terms"]
