"""`spear-fast eval`: success of a run's or a folder's policy on held-out tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from spear_fast.errors import ConfigError

from .pages import success_text

if TYPE_CHECKING:
    from spear_fast.assemble import Policy
    from spear_fast.config.schema import RunConfig
    from spear_fast.dist import Ranks
    from spear_fast.envs.base import TaskSet


def evaluate_source(args: argparse.Namespace) -> int:
    """Evaluate what `args.source` names, and print the statistics."""
    from spear_fast.assemble import close_tasks, load_policy, make_tasks
    from spear_fast.dist import stand_alone
    from spear_fast.update.model import silence_progress_bars

    silence_progress_bars()
    config, model = _eval_config(args.source, args.task, args.overrides)
    tasks = make_tasks(config)
    try:
        policy = load_policy(model, config, tasks)
        stats = measure_success(config, model, tasks, policy, stand_alone(config.device))
    finally:
        close_tasks(tasks)
    print(f"{model} on {args.task}: success {success_text(stats)}")
    for name, value in stats.items():
        print(f"  {name} {value:.4g}")
    return 0


def measure_success(
    config: RunConfig,
    folder: Path,
    tasks: TaskSet,
    policy: Policy,
    ranks: Ranks,
    park: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Start an engine for the model in `folder`, give it the policy's weights and count successes; see `evaluate`.

    All ranks take part. With a memory plan that wants the trainer's tensors out of the way, `park` is called once the
    engine has the weights.
    """
    from spear_fast.assemble import make_collector, make_engine, plan_run, push_policy
    from spear_fast.evaluate import evaluate

    with ExitStack() as owned:
        plan = plan_run(config, folder, ranks)
        engine = owned.enter_context(closing(make_engine(config, folder, policy, ranks, plan)))
        collector = owned.enter_context(closing(make_collector(config, tasks, policy, engine)))
        push_policy(config, policy, engine, version=0, verify=True)
        if park is not None and plan.mode == "offload":
            park()
        stats, _ = evaluate(config, tasks, collector, ranks)
    return stats


def _eval_config(source: Path, task: str, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """The configuration to evaluate with, and the model's folder: a run brings its own, a model gets the defaults."""
    from spear_fast.checkpoint.load import load_latest
    from spear_fast.config.load import load_config
    from spear_fast.run_folder import RunFolder

    saved = RunFolder(source).config
    if saved.exists():
        model = load_latest(source).folder("model")
        settings = load_config(saved).model_dump()
        if settings["task"]["name"] != task:
            settings["task"] = {"name": task}
        return load_config(None, overrides, settings), model
    if not (source / "config.json").exists():
        raise ConfigError(
            f"{source} is neither a run's folder (config.yaml) nor a model's (config.json); check the path"
        )
    base = {"name": "eval", "steps": 0, "task": {"name": task}, "model": {"path": str(source)}}
    return load_config(None, overrides, base), source
