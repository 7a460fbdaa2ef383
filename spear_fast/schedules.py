"""Ramps and decays: plain functions of the step, without state."""

from __future__ import annotations

import math
from typing import Literal


def cosine_decay(step: int, decay_steps: int) -> float:
    """Return mu(step) = (cos(pi * step / T) + 1) / 2 for step <= T = `decay_steps`, else 0.

    Falls from 1 at step 0 to 0 at step T, in training steps. `decay_steps` of 0 means already decayed.
    Source: SPEAR (arXiv 2509.22601), the weight of the tool-call reward.
    """
    if decay_steps <= 0 or step > decay_steps:
        return 0.0
    return (math.cos(math.pi * step / decay_steps) + 1.0) / 2.0


def cosine_warmup(step: int, warmup_steps: int) -> float:
    """Return gamma(step) = (1 - cos(pi * step / T)) / 2 for step <= T = `warmup_steps`, else 1.

    Rises from 0 at step 0 to 1 at step T, in training steps. `warmup_steps` of 0 means no warm-up.
    Source: SPEAR (arXiv 2509.22601), the weight of the self-imitation loss.
    """
    if warmup_steps <= 0 or step > warmup_steps:
        return 1.0
    return (1.0 - math.cos(math.pi * step / warmup_steps)) / 2.0


def intrinsic_weight(mode: Literal["cosine", "constant", "none"], step: int, decay_steps: int) -> float:
    """Return mu of R = R_outcome + mu * R_tool: `cosine_decay`, always 1, or always 0. Raises ValueError otherwise."""
    if mode == "cosine":
        return cosine_decay(step, decay_steps)
    if mode == "constant":
        return 1.0
    if mode == "none":
        return 0.0
    raise ValueError(f"mode={mode!r} is unknown; use 'cosine', 'constant' or 'none'")


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Return the learning-rate factor of optimizer step `step` (from 0): (step + 1) / warmup_steps, at most 1.

    The first step already moves the weights, and step `warmup_steps` - 1 has the full rate.
    """
    if warmup_steps <= 0:
        return 1.0
    return min(1.0, (step + 1) / warmup_steps)


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning-rate factor of optimizer step `step` (from 0): linear warm-up, then half a cosine to 0.

    The factor reaches 0 at `total_steps`, one step after the last, so every step moves the weights.
    """
    if step < warmup_steps:
        return linear_warmup(step, warmup_steps)
    return cosine_decay(step - warmup_steps, total_steps - warmup_steps)
