"""`spear-fast train`: a run of reinforcement learning, and its closing report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .pages import print_curves, print_plan, success_text
from .running import EXIT_STOPPED, running

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
    from spear_fast.trainer import Trainer

    with running(config, config.steps, lambda progress: Trainer(config, progress, resume=args.resume)) as trainer:
        trainer.run()
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
