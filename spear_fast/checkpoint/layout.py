"""Names and integrity of checkpoint folders.

checkpoints/latest                 text: the name of the checkpoint to resume from
checkpoints/step_000040/           one checkpoint, complete when every file of its manifest has its size
    manifest.json                  {"format": 2, "step": 40, "files": {"trainer.json": 123, ...}}
    <name>.pt                      tensors and numbers, torch.save
    <name>.npz                     numpy arrays, no pickle
    <name>.json                    plain values
    <name>/                        whatever its writer put there: a Hugging Face model, shards of several ranks
checkpoints/step_000040.old/       an earlier save of the same step, alive only while that save is replaced
checkpoints/.saving-step_000040/   a save in progress, or what a killed one left
"""

from __future__ import annotations

import json
import re
from pathlib import Path

POINTER = "latest"
MANIFEST = "manifest.json"
FORMAT = 2
"""1 held the whole policy and optimizer in one file each."""
TEMPORARY_PREFIX = ".saving-"
OLD_SUFFIX = ".old"

_NAME = re.compile(rf"step_(\d{{6,}})({re.escape(OLD_SUFFIX)})?")


def checkpoints_folder(run_folder: Path) -> Path:
    """Folder that holds all checkpoints of a run."""
    return run_folder / "checkpoints"


def step_name(step: int) -> str:
    """Folder name of a checkpoint, e.g. step_000040."""
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """Training step of a checkpoint's folder name, or None for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_files(folder: Path) -> list[Path]:
    """All files below `folder`, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a readable manifest and every file of it with the size it was written with."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_first(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, complete or not, the highest step first and a current one before its old twin."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and step_of(path.name) is not None]
    return sorted(found, key=lambda path: (step_of(path.name), not path.name.endswith(OLD_SUFFIX)), reverse=True)


def pointed_to(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, whether or not it is there; None without a usable pointer."""
    try:
        name = (folder / POINTER).read_text().strip()
    except OSError:
        return None
    return folder / name if step_of(name) is not None else None
