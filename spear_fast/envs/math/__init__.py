"""Mathematics with a code interpreter: problems from reasoning-gym or from files, answers in \\boxed{}."""

from __future__ import annotations

from .tasks import MathTasks

__all__ = ["MathTasks"]
