"""One run of a study in a process of its own: trains until the environment steps are used up, and can be resumed.

python bench/studies/run.py CONFIG --env-steps 20000 [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.studies.records import env_steps
from spear_fast.checkpoint.layout import checkpoints_folder, is_complete, newest_first
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.log.progress import make_progress
from spear_fast.log.records import METRICS_FILE, read_records
from spear_fast.trainer import Trainer
from spear_fast.update.model import silence_progress_bars


class Budget:
    """A sink that stops the trainer after the step in which the environment steps are used up."""

    def __init__(self, trainer: Trainer, limit: int, used: int) -> None:
        self._trainer = trainer
        self._limit = limit
        self._used = used

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Count the environment steps of a training step."""
        self._used += env_steps(values)
        if self._used >= self._limit:
            self._trainer.stop_requested = True

    def close(self) -> None:
        """Nothing is held."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train or go on, and evaluate at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("--env-steps", type=int, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    silence_progress_bars()
    train(load_config(args.config, args.overrides), args.env_steps)


def train(config: RunConfig, limit: int) -> None:
    """Train a run to its last step or until `limit` environment steps, whichever comes first, then evaluate.

    A run whose folder has a checkpoint goes on from the newest.
    """
    folder = Path(config.out) / config.name
    resume = any(is_complete(path) for path in newest_first(checkpoints_folder(folder)))
    with make_progress("plain", config.steps, config.name) as progress:
        trainer = Trainer(config, progress, resume=resume)
        try:
            used = sum(map(env_steps, read_records(folder / METRICS_FILE)))
            trainer.sinks.append(Budget(trainer, limit, used))
            if used < limit:
                trainer.run()
            if used >= limit or trainer.stop_requested:
                trainer.evaluate()
        finally:
            trainer.close()


if __name__ == "__main__":
    main()
