"""TRL."""

from __future__ import annotations

from .config import SPEARConfig
from .logprob import LogProbMixin, patch_trainer
from .trainer import SPEARTrainer

__all__ = ["LogProbMixin", "SPEARConfig", "SPEARTrainer", "patch_trainer"]
