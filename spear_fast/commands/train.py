"""`spear-fast train`: a run of reinforcement learning, and its closing report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .pages import print_curves, print_plan, success_text
from .signals import EXIT_STOPPED, stop_on_sigterm

if TYPE_CHECKING:
    from spear_fast.trainer import Trainer


def train(args: argparse.Namespace) -> int:
    """Train, or with --dry-run print the plan."""
    from spear_fast.config.load import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from spear_fast.config.describe import describe

        print_plan(f"Plan of run {config.name}", describe(config), config, args.config)
        return 0
    from spear_fast.dist import is_main_rank
    from spear_fast.log.progress import make_progress
    from spear_fast.trainer import Trainer
    from spear_fast.update.model import silence_progress_bars

    silence_progress_bars()
    shown = config.log.progress if is_main_rank() else "off"
    with make_progress(shown, config.steps, config.name) as progress:
        trainer = Trainer(config, progress, resume=args.resume)
        try:
            stop_on_sigterm(trainer)
            trainer.run()
        finally:
            trainer.close()
    if not is_main_rank():
        return EXIT_STOPPED if trainer.stop_requested else 0
    return _report(trainer)


def _report(trainer: Trainer) -> int:
    from spear_fast.log.records import METRICS_FILE, read_records

    folder = trainer.folder
    evaluations = [r for r in read_records(folder.path / METRICS_FILE) if "eval/success_rate" in r]
    for record in (evaluations[0], evaluations[-1]):
        print(f"held-out success after step {record['step']}: {success_text(record)}")
    print_curves(folder)
    print(f"run folder: {folder.path}")
    if trainer.stop_requested:
        print("stopped early; continue with the same command and --resume")
        return EXIT_STOPPED
    return 0
