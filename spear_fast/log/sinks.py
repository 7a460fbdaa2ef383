"""Where metrics go: metrics.jsonl always, TensorBoard events when the package is installed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Protocol

from spear_fast.errors import MissingDependencyError

from .records import METRICS_FILE, read_records

_LOGGER = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
"""Name of the folder of event files in a run's folder."""


class Sink(Protocol):
    """Takes the metrics of one step at a time."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of `step`; names are unique within a call."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class JsonlSink:
    """Appends one JSON object per call: `{"step": 3, "time_s": 2.1, "reward/mean": 0.4}`; not-finite numbers are null.

    Each line is flushed, so a killed run loses none. Opening drops the lines of `first_step` and later, which a
    resumed run writes again; 0 starts an empty file.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        finite = {name: value if isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes scalars for TensorBoard; on resume, events of `first_step` and later are purged from its display.

    Raises MissingDependencyError without the package tensorboard.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        if not tensorboard_installed():
            raise MissingDependencyError("tensorboard", "track", "writing TensorBoard events")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per finite number."""
        for name, value in values.items():
            if isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def tensorboard_installed() -> bool:
    """Return whether the package tensorboard can be imported, without importing it."""
    return find_spec("tensorboard") is not None


def open_sinks(run_folder: Path, *, tensorboard: bool, first_step: int = 0) -> list[Sink]:
    """Return the sinks of a run; `first_step` is the first step this process will write.

    TensorBoard that is asked for but not installed is left out with one logged notice.
    """
    sinks: list[Sink] = [JsonlSink(run_folder / METRICS_FILE, first_step)]
    if tensorboard and tensorboard_installed():
        sinks.append(TensorBoardSink(run_folder / TENSORBOARD_FOLDER, first_step))
    elif tensorboard:
        _LOGGER.warning(
            "tensorboard is not installed, metrics go to %s only; pip install 'spear-fast[track]', "
            "or set log.tensorboard=false",
            METRICS_FILE,
        )
    return sinks


def _keep_before(path: Path, first_step: int) -> None:
    """Rewrite the file with the lines of earlier steps only, atomically: a crash here leaves the old or the new."""
    records = read_records(path) if first_step > 0 and path.exists() else []
    kept = [json.dumps(record) + "\n" for record in records if record["step"] < first_step]
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
