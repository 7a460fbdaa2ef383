"""Loading: find the checkpoint to resume from, skip broken ones, read its parts."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_fast.errors import CheckpointError

from . import layout


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint. Parts are read when asked for, by the names they were saved under.

    Example: `load_latest("runs/a").values("trainer")["finished_steps"]`.
    """

    path: Path
    step: int

    def tensors(self, name: str, device: torch.device | str = "cpu") -> Any:
        """Content of <name>.pt, its tensors on `device`. Raises CheckpointError."""
        path = self._part(f"{name}.pt")
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            raise _damaged(path, error) from error

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Content of <name>.npz. Raises CheckpointError."""
        path = self._part(f"{name}.npz")
        try:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from error

    def values(self, name: str) -> Any:
        """Content of <name>.json. Raises CheckpointError."""
        path = self._part(f"{name}.json")
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise _damaged(path, error) from error

    def folder(self, name: str) -> Path:
        """The folder <name>. Raises CheckpointError."""
        return self._part(name)

    def _part(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise CheckpointError(
                f"checkpoint {self.path} has no part {name!r}; it was saved by a run with other settings, "
                "so resume with those or start a new run"
            )
        return path


def load_latest(run_folder: Path | str) -> Checkpoint:
    """Return the checkpoint to resume a run from: the one pointed to, else the newest complete one.

    Raises CheckpointError if there is none, or if it was written in a newer format.
    """
    folder = layout.checkpoints_folder(Path(run_folder))
    pointed = layout.pointed_to(folder)
    candidates = ([pointed] if pointed else []) + layout.newest_first(folder)
    for path in candidates:
        if layout.is_complete(path):
            return _open(path)
    found = ", ".join(path.name for path in candidates)
    reason = f"only incomplete ones ({found})" if found else "none"
    raise CheckpointError(f"no complete checkpoint in {folder}: found {reason}; start the run without --resume")


def _open(path: Path) -> Checkpoint:
    manifest = json.loads((path / layout.MANIFEST).read_text())
    if manifest.get("format") != layout.FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {manifest.get('format')!r}, this version reads "
            f"{layout.FORMAT}; resume with the version of spear-fast that wrote it"
        )
    return Checkpoint(path, int(manifest["step"]))


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error}; the file is damaged, so delete its checkpoint folder to resume "
        "from the one before"
    )
