"""On-policy advantages: GRPO over the samples of a prompt, GiGPO over repeated states as well."""

from __future__ import annotations

from .fill import fill

__all__ = ["fill"]
