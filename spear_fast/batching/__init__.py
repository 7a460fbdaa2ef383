"""Batching: trajectories to training rows, rows to mini-batches and packed micro-batches."""

from __future__ import annotations

from .balance import distribute
from .counts import Counts, count
from .minibatches import split
from .pack import collate, pack
from .rows import rows_from_groups

__all__ = ["Counts", "collate", "count", "distribute", "pack", "rows_from_groups", "split"]
