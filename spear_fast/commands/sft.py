"""`spear-fast sft`: a supervised run on demonstrations, and what its policy can do at the end."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from spear_fast.errors import TaskError

from .evaluate import measure_success
from .pages import print_curves, print_plan, success_text
from .running import EXIT_STOPPED, running

if TYPE_CHECKING:
    from spear_fast.sft import Sft


def sft(args: argparse.Namespace) -> int:
    """Train on demonstrations, or with --dry-run print the plan."""
    from spear_fast.config.load import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from spear_fast.config.describe import describe_sft

        print_plan(f"Plan of supervised run {config.name}", describe_sft(config), config, args.config)
        return 0
    from spear_fast.dist import is_main_rank
    from spear_fast.sft import Sft

    with running(config, config.cold_start.steps, lambda progress: Sft(config, progress, resume=args.resume)) as run:
        run.run()
        success = {} if run.stop_requested else _success(run)
    if run.stop_requested:
        if is_main_rank():
            print("stopped early; continue with the same command and --resume")
        return EXIT_STOPPED
    if is_main_rank():
        _report(run, success)
    return 0


def _success(run: Sft) -> dict[str, float]:
    """Success on held-out tasks, logged under the last step; empty where there are none or it is not asked for."""
    from spear_fast.update.offload import offload

    config, policy = run.config, run.policy
    if not config.cold_start.eval_success or not _has_held_out(run):
        return {}
    run.progress.phase("success on held-out tasks")
    started = time.perf_counter()
    stats = measure_success(
        config,
        run.model_folder,
        run.tasks,
        policy,
        run.ranks,
        park=lambda: offload(policy.model, run.imitation.updater.optimizer),
    )
    stats["time/eval_s"] = time.perf_counter() - started
    run.write(stats)
    return stats


def _has_held_out(run: Sft) -> bool:
    try:
        return run.tasks.size("eval") > 0
    except TaskError:
        return False


def _report(run: Sft, success: dict[str, float]) -> None:
    from spear_fast.log.records import METRICS_FILE, read_records

    records = read_records(run.folder.path / METRICS_FILE)
    for name, label in (("sft/loss_nats", "loss of the batch"), ("sft/eval_loss_nats", "held-out loss")):
        found = [record for record in records if record.get(name) is not None]
        if found:
            first, last = found[0], found[-1]
            print(
                f"{label}: {first[name]:.3f} nats per token at step {first['step']}, {last[name]:.3f} at step "
                f"{last['step']}"
            )
    if success:
        print(f"held-out success: {success_text(success)}")
    print_curves(run.folder)
    print(f"model: {run.model_folder}")
