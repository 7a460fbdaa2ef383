"""What SPEARTrainer adds to a checkpoint of TRL: the round and the replay memory, in one file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spear_fast.errors import CheckpointError
from spear_fast.replay import ReplayMemory

FILE = "spear_state.npz"
_ROUND, _MEMORY = "finished_rounds", "memory."


def save_state(folder: str | Path, finished_rounds: int, memory: Mapping[str, np.ndarray]) -> None:
    """Write `folder`/spear_state.npz, whole or not at all; `memory` is the replay memory's state, empty without one."""
    arrays = {_MEMORY + name: array for name, array in memory.items()}
    path = Path(folder) / FILE
    aside = path.with_name("tmp_" + FILE)
    with open(aside, "wb") as file:
        np.savez(file, **{_ROUND: np.array(finished_rounds)}, **arrays)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_state(folder: str | Path, memory: ReplayMemory | None) -> int:
    """Restore the memory from `folder` and return the number of finished rounds.

    A checkpoint written without replay leaves the memory empty. Raises CheckpointError if the file is missing or does
    not hold such a state.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r} has no {FILE}; resume from a checkpoint of SPEARTrainer (without "
            "save_only_model), or start a new run from its weights"
        )
    try:
        with np.load(path) as arrays:
            stored = {name.removeprefix(_MEMORY): arrays[name] for name in arrays if name.startswith(_MEMORY)}
            finished = int(arrays[_ROUND])
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r}: {FILE} is damaged or not of SPEARTrainer ({error}); resume from "
            "another checkpoint, or start a new run from its weights"
        ) from error
    if memory is not None and stored:
        memory.load_state_dict(stored)
    return finished
