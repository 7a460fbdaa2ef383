"""Versioned push of the trained weights into the rollout engine."""

from __future__ import annotations

import torch

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Engine


@torch.no_grad()
def push_weights(model: torch.nn.Module, engine: Engine, version: int) -> dict[str, float]:
    """Copy every parameter into the engine and make sure that it took the new version.

    Tied weights appear once in `named_parameters`, and once in an engine of the same architecture.

    Returns:
        `sync/version` in training steps and `sync/bytes`.

    Raises:
        EngineError: The engine did not take the version.
    """
    named = list(model.named_parameters())
    engine.load_weights(named, version)
    if engine.weights_version != version:
        raise EngineError(
            f"the engine reports weights version {engine.weights_version} after version {version} was pushed; "
            "it would sample from stale weights"
        )
    size = sum(parameter.numel() * parameter.element_size() for _, parameter in named)
    return {"sync/version": float(version), "sync/bytes": float(size)}
