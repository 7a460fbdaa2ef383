"""Sokoban in text: push every box onto a target."""

from .tasks import SokobanParams, SokobanTasks

__all__ = ["SokobanParams", "SokobanTasks"]
