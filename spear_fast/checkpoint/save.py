"""Saving: a process killed at any moment leaves either the previous checkpoint or the new one, never a mixture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from spear_fast.dist import Ranks
from spear_fast.errors import CheckpointError

from . import layout


def save(
    run_folder: Path | str,
    step: int,
    *,
    tensors: Mapping[str, Any] | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    values: Mapping[str, Any] | None = None,
    folders: Mapping[str, Callable[[Path], object]] | None = None,
    keep: int = 2,
    ranks: Ranks | None = None,
) -> Path:
    """Write the checkpoint of training step `step` and make it the one to resume from; return its folder.

    Each part is a name and a content: `tensors` go to <name>.pt (tensors, numbers, strings, and lists, tuples and
    dicts of them), `arrays` to <name>.npz, `values` to <name>.json, and each of `folders` writes into the new folder
    <name> that it is given. The `keep` newest checkpoints remain. Raises CheckpointError if nothing could be written;
    the previous checkpoint then still stands.

    On several ranks all call it with their own `folders` writers, which may communicate; the rest is the main rank's.
    Their nodes must share the file system.
    """
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    folder = layout.checkpoints_folder(Path(run_folder))
    target = folder / layout.step_name(step)
    temporary = folder / (layout.TEMPORARY_PREFIX + target.name)

    def prepare() -> None:
        with _explained(target):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name in folders or {}:
                (temporary / name).mkdir()

    def finish() -> None:
        with _explained(target):
            _write_parts(temporary, tensors or {}, arrays or {}, values or {})
            _write_manifest(temporary, step)
            _put_in_place(temporary, target)
            _point_to(target)
            _delete_superseded(folder, target, keep)

    ranks.on_main(prepare)
    with _explained(target):
        for name, write in (folders or {}).items():
            write(temporary / name)
    ranks.barrier()
    ranks.on_main(finish)
    return target


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the file system says into an error with a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(
            f"cannot save checkpoint {target}: {error}; free space or fix permissions there"
        ) from error


def _write_parts(
    folder: Path, tensors: Mapping[str, Any], arrays: Mapping[str, Mapping[str, np.ndarray]], values: Mapping[str, Any]
) -> None:
    for name, content in tensors.items():
        torch.save(content, folder / f"{name}.pt")
    for name, content in arrays.items():
        pickled = [key for key, array in content.items() if np.asarray(array).dtype.hasobject]
        if pickled:
            raise CheckpointError(f"arrays {pickled} of part {name!r} hold Python objects; convert them to numbers")
        np.savez(folder / f"{name}.npz", **cast("dict[str, Any]", content))
    for name, content in values.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def _write_manifest(folder: Path, step: int) -> None:
    """Flush every part to the disk, then record the sizes."""
    files = layout.list_files(folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / layout.MANIFEST
    manifest.write_text(json.dumps({"format": layout.FORMAT, "step": step, "files": sizes}, indent=1))
    for path in [*files, manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush(path)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; an earlier save of the same step steps aside and stays loadable until the pointer is written."""
    if target.exists():
        aside = target.with_name(target.name + layout.OLD_SUFFIX)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    temporary.rename(target)
    _flush(target.parent)


def _point_to(target: Path) -> None:
    pointer = target.parent / layout.POINTER
    draft = pointer.with_name(layout.TEMPORARY_PREFIX + pointer.name)
    draft.write_text(target.name + "\n")
    _flush(draft)
    draft.replace(pointer)
    _flush(target.parent)


def _delete_superseded(folder: Path, target: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, never `target`, and what killed saves left."""
    current = [path for path in layout.newest_first(folder) if not path.name.endswith(layout.OLD_SUFFIX)]
    kept = [path for path in current if layout.is_complete(path)][: max(keep, 1)]
    for path in layout.newest_first(folder):
        if path != target and path not in kept:
            shutil.rmtree(path)
    for path in folder.glob(layout.TEMPORARY_PREFIX + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
