"""The global random state of every kind, as a part of a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from spear_fast.errors import CheckpointError


def capture_rng() -> dict[str, Any]:
    """Return the state of the python, numpy, torch and CUDA generators, as tensors and plain values."""
    legacy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned. Raises CheckpointError for a state of another shape.

    CUDA generators are restored for the devices present in both; a run moved to other hardware keeps the rest as is.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy_state = state["numpy"]
        key = numpy_state["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["gauss"]))
        torch.set_rng_state(state["torch"])
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, cuda_state in enumerate(state["cuda"][:devices]):
            torch.cuda.set_rng_state(cuda_state, index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the saved random state cannot be restored: {error!r}; it is damaged, or was saved by an "
            "incompatible version"
        ) from error
