"""Rewards: the environment's outcome plus the decaying reward for using tools."""

from __future__ import annotations

from .combine import score

__all__ = ["score"]
