"""Checkpoints: atomic save, load of the newest complete one, random state. Knows files, not what is in them."""

from __future__ import annotations

from .load import Checkpoint, load_latest
from .rng import capture_rng, restore_rng
from .save import save

__all__ = ["Checkpoint", "capture_rng", "load_latest", "restore_rng", "save"]
