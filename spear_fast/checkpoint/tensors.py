"""Sharded tensors to and from a folder, through torch.distributed.checkpoint; any number of ranks reads any other's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from spear_fast.dist import Ranks
from spear_fast.errors import CheckpointError


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Write named tensors, sharded ones (DTensor) from every rank its part. All ranks call it with the same names."""
    alone = ranks.cpu_group is None
    with _quiet():
        save(dict(tensors), checkpoint_id=folder, process_group=ranks.cpu_group, no_dist=alone)


def load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Fill the named tensors in place, sharded ones with this rank's part. All ranks call it with the same names.

    Raises CheckpointError if one is missing or has another shape there.
    """
    alone = ranks.cpu_group is None
    try:
        with _quiet():
            load(dict(tensors), checkpoint_id=folder, process_group=ranks.cpu_group, no_dist=alone)
    except Exception as error:  # it wraps whatever went wrong on any rank
        raise CheckpointError(
            f"cannot read {folder}: {error}; it is damaged, or was saved by a run with another model or other settings"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
