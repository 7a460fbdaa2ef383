"""The command line: train, plan, eval, plot. Every option of a run is a key of the configuration."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from spear_fast import __version__
from spear_fast.errors import ConfigError, MissingDependencyError, SpearError

if TYPE_CHECKING:
    from spear_fast.config.schema import RunConfig
    from spear_fast.planning import Section
    from spear_fast.trainer import Trainer

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143
TRAIN_PACKAGES = ("transformers", "tokenizers", "safetensors", "jinja2")
"""What only the extra `train` installs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. Errors of the user's making are printed without a traceback."""
    args = _parse(argv)
    try:
        return int(args.run(args))
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_PACKAGES:
            raise
        print(f"error: {MissingDependencyError(error.name, 'train', 'this command')}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; a training run continues from its newest checkpoint with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; overrides may stand before or behind options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    wrong = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if wrong or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spear-fast", description="Train LLM agents with SPEAR.")
    parser.add_argument("--version", action="version", version=f"spear-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a policy")
    train.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. algo.replay.enabled=false seed=3")
    train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    train.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    train.set_defaults(run=_train)
    plan = commands.add_parser("plan", help="predict memory and step time on GPUs that need not be here")
    plan.add_argument("config", type=Path, help="YAML file, e.g. configs/paper/math-qwen2.5-32b-drbot-spear.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. update.token_budget=32768")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="e.g. h200-141g")
    plan.add_argument("--nodes", type=int, metavar="N", help="machines they are in; default: as full as is usual")
    plan.add_argument("--shape", type=Path, metavar="FILE", help="config.json of the model, if model.path is not here")
    plan.add_argument("--coefficients", type=Path, metavar="FILE", help="rates measured by bench/calibrate.py")
    plan.add_argument("--tokens", type=float, metavar="N", help="mean tokens of a trajectory")
    plan.add_argument("--sampled", type=float, metavar="N", help="mean tokens of it that the policy samples")
    plan.set_defaults(run=_plan)
    evaluate = commands.add_parser("eval", help="success on held-out tasks, with a confidence interval")
    evaluate.add_argument("source", type=Path, metavar="RUN_OR_MODEL", help="a run's folder or a Hugging Face folder")
    evaluate.add_argument("task", metavar="TASK", help="a task set, e.g. calculator")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. eval.num_tasks=256")
    evaluate.set_defaults(run=_eval)
    plot = commands.add_parser("plot", help="draw the curves of one or more runs")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    plot.add_argument("--out", type=Path, help="PNG file; default: curves.png in the (first) run's folder")
    plot.set_defaults(run=_plot)
    return parser


def _train(args: argparse.Namespace) -> int:
    from spear_fast.config.load import dump_config, load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        _dry_run(config, args.config)
        print(dump_config(config), end="")
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
            _stop_on_sigterm(trainer)
            trainer.run()
        finally:
            trainer.close()
    if not is_main_rank():
        return EXIT_STOPPED if trainer.stop_requested else 0
    return _report(trainer)


def _report(trainer: Trainer) -> int:
    from spear_fast.log.plot import plot_runs
    from spear_fast.log.records import METRICS_FILE, read_records

    folder = trainer.folder
    evaluations = [r for r in read_records(folder.path / METRICS_FILE) if "eval/success_rate" in r]
    for record in (evaluations[0], evaluations[-1]):
        print(f"held-out success after step {record['step']}: {_success_text(record)}")
    try:
        print(f"curves: {plot_runs([folder.path], folder.curves)}")
    except MissingDependencyError as error:
        print(f"no curves drawn: {error}")
    print(f"run folder: {folder.path}")
    if trainer.stop_requested:
        print("stopped early; continue with the same command and --resume")
        return EXIT_STOPPED
    return 0


def _eval(args: argparse.Namespace) -> int:
    from spear_fast.assemble import (
        close_tasks,
        load_policy,
        make_collector,
        make_engine,
        make_tasks,
        plan_run,
        push_policy,
    )
    from spear_fast.dist import stand_alone
    from spear_fast.evaluate import evaluate
    from spear_fast.update.model import silence_progress_bars

    silence_progress_bars()
    config, model = _eval_config(args.source, args.task, args.overrides)
    with ExitStack() as owned:
        tasks = make_tasks(config)
        owned.callback(close_tasks, tasks)
        ranks = stand_alone(config.device)
        policy = load_policy(model, config, tasks)
        engine = owned.enter_context(closing(make_engine(config, model, policy, ranks, plan_run(config, model, ranks))))
        collector = owned.enter_context(closing(make_collector(config, tasks, policy, engine)))
        push_policy(config, policy, engine, version=0, verify=True)
        stats, _ = evaluate(config, tasks, collector, ranks)
    print(f"{model} on {args.task}: success {_success_text(stats)}")
    for name, value in stats.items():
        print(f"  {name} {value:.4g}")
    return 0


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


def _plot(args: argparse.Namespace) -> int:
    from spear_fast.log.plot import plot_runs

    print(plot_runs(args.runs, args.out or args.runs[0] / "curves.png"))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from spear_fast.config.load import load_config
    from spear_fast.planning import elsewhere, shape_of_run

    if args.gpus < 1 or (args.nodes or 1) < 1:
        raise ConfigError(f"--gpus {args.gpus} --nodes {args.nodes}: there must be at least one of each")
    config = load_config(args.config, args.overrides)
    sections = elsewhere(
        config,
        shape_of_run(config, args.config, args.shape),
        num_gpus=args.gpus,
        gpu_name=args.gpu,
        num_nodes=args.nodes,
        coefficients=args.coefficients,
        tokens=args.tokens,
        sampled=args.sampled,
    )
    _print_sections(sections)
    return 0


def _dry_run(config: RunConfig, file: Path) -> None:
    from spear_fast.config.describe import describe
    from spear_fast.planning import Section, here

    _print_sections([Section(f"Plan of run {config.name}", [("", ""), *describe(config)]), *here(config, file)])


def _print_sections(sections: Sequence[Section]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in sections:
        if section.rows:
            header, *rows = section.rows
            table = Table(*header, title=section.title, show_header=any(header), title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for index, note in enumerate(section.notes):
            prefix = f"{section.title}: " if not section.rows and index == 0 else ""
            # Not rich's own printing, which would break lines at the terminal's width and read brackets as markup.
            print(prefix + note)


def _stop_on_sigterm(trainer: Trainer) -> None:
    """Let the running step finish and be saved before the process ends."""

    def request_stop(*_: object) -> None:
        trainer.stop_requested = True

    # Only the main thread may set handlers; a caller on another thread keeps its own.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, request_stop)


def _success_text(stats: dict[str, float]) -> str:
    return (
        f"{stats['eval/success_rate']:.1%} (95 % interval {stats['eval/success_low']:.1%} to "
        f"{stats['eval/success_high']:.1%}, {stats['eval/num_tasks']:.0f} tasks)"
    )


if __name__ == "__main__":
    sys.exit(main())
