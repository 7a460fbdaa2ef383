"""Replay: past successes, kept unpadded, recalibrated and drawn for self-imitation."""

from __future__ import annotations

from .memory import ReplayMemory

__all__ = ["ReplayMemory"]
