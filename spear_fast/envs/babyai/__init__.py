"""BabyAI in text: instructions in grids of rooms, seen a part at a time."""

from .tasks import LADDER, BabyAIParams, BabyAITasks

__all__ = ["LADDER", "BabyAIParams", "BabyAITasks"]
