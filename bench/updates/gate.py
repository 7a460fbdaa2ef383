"""Whether two trainers computed the same: distances of their losses and of every parameter's gradient."""

from __future__ import annotations

from typing import Any

import torch

from bench.updates.job import Gradients

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest relative distance by type of the forward pass; half-precision passes of two programs round differently."""
SMALLEST_LOSS = 0.01
"""Losses are measured by this if they are smaller, since advantages of a group cancel in them."""
SMALLEST_SHARE = 1e-3
"""Gradients of a parameter are measured by this share of the norm of all if theirs is smaller."""


def distances(found: Gradients, expected: Gradients) -> dict[str, Any]:
    """Relative distances: `loss`, `gradient` of all parameters, and `worst_gradient` of `worst_parameter`.

    NaN if parameters are missing or not finite, so that nothing incomplete passes.
    """
    if set(found.of) != set(expected.of):
        odd = sorted(set(found.of) ^ set(expected.of))[0]
        nothing = float("nan")
        return {"loss": nothing, "gradient": nothing, "worst_gradient": nothing, "worst_parameter": odd}
    gaps = {name: (found.of[name].double() - expected.of[name].double()).norm() for name in expected.of}
    norms = {name: expected.of[name].double().norm() for name in expected.of}
    whole = torch.stack(list(norms.values())).norm()
    shares = {name: (gaps[name] / norms[name].clamp(min=SMALLEST_SHARE * whole)).item() for name in gaps}
    worst = max(shares, key=lambda name: (shares[name] != shares[name], shares[name]))
    return {
        "loss": abs(found.loss - expected.loss) / max(abs(expected.loss), SMALLEST_LOSS),
        "gradient": (torch.stack(list(gaps.values())).norm() / whole).item(),
        "worst_gradient": shares[worst],
        "worst_parameter": worst,
    }


def complaint(gate: dict[str, Any], dtype: str) -> str | None:
    """Why a trainer with these distances gets no speed figure, or None if it is right; NaN is never right."""
    bound = TOLERANCE[dtype]
    wrong = [
        f"{name} off by {gate[name]:.2g}" for name in ("loss", "gradient", "worst_gradient") if not gate[name] <= bound
    ]
    return f"{', '.join(wrong)} ({gate['worst_parameter']}), allowed {bound:g}" if wrong else None
