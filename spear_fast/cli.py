"""The command line's arguments and exit codes. Every option of a run is a key of the configuration."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from spear_fast import __version__
from spear_fast.commands.evaluate import evaluate_source
from spear_fast.commands.plan import plan
from spear_fast.commands.plot import plot
from spear_fast.commands.sft import sft
from spear_fast.commands.tasks import tasks
from spear_fast.commands.train import train
from spear_fast.errors import MissingDependencyError, SpearError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141
"""As shells report a program that a closed pipe ended."""
TRAIN_PACKAGES = ("transformers", "tokenizers", "safetensors", "jinja2")
"""What only the extra `train` installs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. Errors of the user's making are printed without a traceback."""
    args = _parse(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
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
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return EXIT_OUTPUT_CLOSED


def _output_is_closed() -> bool:
    """Whether whoever read this command's output has gone, as `| head` does; if so nothing more is written to it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported unasked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


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
    _add_runs(commands)
    _add_tasks(commands)
    _add_plan(commands)
    evaluate = commands.add_parser("eval", help="success on held-out tasks, with a confidence interval")
    evaluate.add_argument("source", type=Path, metavar="RUN_OR_MODEL", help="a run's folder or a Hugging Face folder")
    evaluate.add_argument("task", metavar="TASK", help="a task set, e.g. calculator")
    _add_overrides(evaluate, "eval.num_tasks=256")
    evaluate.set_defaults(run=evaluate_source)
    plot_parser = commands.add_parser("plot", help="draw the curves of one or more runs")
    plot_parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    plot_parser.add_argument("--out", type=Path, help="PNG file; default: curves.png in the (first) run's folder")
    plot_parser.set_defaults(run=plot)
    return parser


def _add_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, run, help_text, example in (
        ("train", train, "train a policy", "algo.replay.enabled=false seed=3"),
        ("sft", sft, "train on demonstrations only, as cold_start says", "cold_start.lr=1e-5 name=sft"),
    ):
        parser = commands.add_parser(name, help=help_text)
        parser.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
        _add_overrides(parser, example)
        parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
        parser.set_defaults(run=run)


def _add_tasks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("tasks", help="list task sets, show one, write demonstrations or games of it")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a task set, e.g. treasure or mypackage.tasks:MyTasks")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="its parameters, e.g. num_rooms=5")
    parser.add_argument("--demos", type=int, metavar="N", help="write N demonstrations of its expert to --out")
    parser.add_argument("--games", type=int, metavar="N", help="write N games of each split to the folder --out")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws, as a run's seed; default 0")
    parser.add_argument("--max-turns", type=int, default=1000, metavar="N", help="longest demonstration; default 1000")
    parser.add_argument("--out", type=Path, metavar="PATH", help="file of --demos, folder of --games")
    parser.set_defaults(run=tasks)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plan", help="predict memory and step time on GPUs that need not be here")
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/paper/math-qwen2.5-32b-drbot-spear.yaml")
    _add_overrides(parser, "update.token_budget=32768")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="e.g. h200-141g")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines they are in; default: as full as is usual")
    parser.add_argument(
        "--shape", type=Path, metavar="FILE", help="config.json of the model, if model.path is not here"
    )
    parser.add_argument("--coefficients", type=Path, metavar="FILE", help="rates measured by bench/calibrate.py")
    parser.add_argument("--tokens", type=float, metavar="N", help="mean tokens of a trajectory")
    parser.add_argument("--sampled", type=float, metavar="N", help="mean tokens of it that the policy samples")
    parser.set_defaults(run=plan)


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")


if __name__ == "__main__":
    sys.exit(main())
