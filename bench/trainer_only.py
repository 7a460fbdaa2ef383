"""A policy update on frozen rollouts, this project's trainer beside TRL's GRPOTrainer: equal gradients, then time.

python bench/trainer_only.py --size cpu --out bench/results/cpu/trainer_only.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import random_policy
from bench.common.failures import NeedsCuda
from bench.common.machine import describe_machine
from bench.common.result_file import write_json
from bench.freeze import GATE, KINDS, SHAPES, freeze, scorer
from bench.updates.frozen import Frozen, FrozenError, describe, read
from bench.updates.gate import TOLERANCE
from bench.updates.job import Job, Trainer
from bench.updates.ours import OurTrainer
from bench.updates.shared_losses import LOSSES
from bench.updates.tables import print_case
from bench.updates.trl_trainer import TrlTrainer
from bench.updates.turns import REFERENCE, Build, Turns, compare, fitting, measure
from spear_fast.errors import SpearError
from spear_fast.update.model import silence_progress_bars

PACKAGES = ("trl", "accelerate", "datasets", "liger-kernel", "flash-attn")
BATCH_SIZES = {"cpu": (4, 16), "cuda": (4, 8, 16, 32)}
"""Sequences per forward pass that TRL is tried with; the fastest is timed."""
ROUNDS = 2
REPEATS = {"cpu": 1, "cuda": 5}
"""Timed steps in each round."""


def _trl(job: Job, batch_size: int) -> Trainer:
    return TrlTrainer(job, batch_size)


def _trl_with_mixin(job: Job, batch_size: int) -> Trainer:
    from spear_fast.integrations.trl import LogProbMixin

    return TrlTrainer(job, batch_size, LogProbMixin)


def _trl_with_liger(job: Job, batch_size: int) -> Trainer:
    if job.device == "cpu":
        raise NeedsCuda("Liger's layers are Triton kernels")
    return TrlTrainer(job, batch_size, more={"use_liger_kernel": True})


ROWS: dict[str, Build] = {
    "ours": lambda job, _: OurTrainer(job),
    "trl": _trl,
    "trl + LogProbMixin": _trl_with_mixin,
    "trl + liger": _trl_with_liger,
}
"""What is compared."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what the options name, write the results after each case, and print tables.

    Returns 1 if TRL failed, or this project's trainer failed or computes other gradients, else 0.
    """
    args = _parser().parse_args(arguments)
    silence_progress_bars()
    warnings.filterwarnings("ignore", module="trl|transformers")
    turns = Turns(
        args.rounds or ROUNDS,
        args.repeats or REPEATS[args.device],
        tuple(args.batch_sizes or BATCH_SIZES[args.device]),
    )
    result: dict[str, Any] = {
        "benchmark": "trainer_only",
        "machine": describe_machine(PACKAGES),
        "settings": {
            **{name: getattr(args, name) for name in ("size", "device", "dtype", "losses", "seed")},
            **asdict(turns),
            "tolerance": TOLERANCE[args.dtype],
            "threads": torch.get_num_threads(),
        },
        "cases": [],
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = args.model or random_policy.build(args.size, Path(temporary), seed=args.seed, device=args.device)
            small, batches = _batches(args, folder)
        except SpearError as error:
            raise SystemExit(str(error)) from error
        for frozen, losses, is_timed in _plan(args, small, batches):
            for loss in losses:
                job = Job(folder, frozen, LOSSES[loss], args.device, args.dtype)
                case = run_case(job, {name: ROWS[name] for name in args.rows}, turns, is_timed=is_timed)
                result["cases"].append(case)
                print_case(case)
                result["settings"]["wall_s"] = time.monotonic() - started
                write_json(result, args.out)
    failed = [case for case in result["cases"] if not _is_right(case)]
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SHAPES, default="cpu", help="of model and batches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of forward and backward passes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of batches that are drawn")
    parser.add_argument("--frozen", nargs="+", type=Path, default=[], help="files to replay instead (needs --model)")
    parser.add_argument("--model", type=Path, help="Hugging Face folder instead of a random model of that size")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["dapo"], help="timed on every batch")
    parser.add_argument("--all-losses", action="store_true", help="compare all losses on the timed batches too")
    parser.add_argument("--no-gate", dest="gate", action="store_false", help="leave out the small batch for all losses")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of TRL, sequences per forward pass")
    parser.add_argument("--rounds", type=int, help="how often each trainer has its turn")
    parser.add_argument("--repeats", type=int, help="timed steps in each turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def _batches(args: argparse.Namespace, folder: Path) -> tuple[Frozen, list[Frozen]]:
    """A small batch, on which all losses are compared, and those that are timed."""
    if args.frozen and not args.model:
        raise FrozenError("--frozen needs --model, the folder of the model whose tokens the files hold")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    score = scorer(folder, args.device)
    small = freeze(GATE, score, config["vocab_size"], args.seed)
    if not args.frozen:
        return small, [freeze(SHAPES[args.size][kind], score, config["vocab_size"], args.seed) for kind in args.kinds]
    batches = [read(path) for path in args.frozen]
    for path, frozen in zip(args.frozen, batches, strict=True):
        if frozen.vocab_size > config["vocab_size"]:
            raise FrozenError(
                f"{path} has vocab_size={frozen.vocab_size}, the model in {folder} {config['vocab_size']}; pass the "
                "model that the rollouts were drawn for"
            )
    return small, batches


def _plan(
    args: argparse.Namespace, small: Frozen, batches: Sequence[Frozen]
) -> list[tuple[Frozen, Sequence[str], bool]]:
    """Which losses are compared on which batch, and whether they are timed."""
    plan: list[tuple[Frozen, Sequence[str], bool]] = [(small, list(LOSSES), False)] if args.gate else []
    for frozen in batches:
        plan.append((frozen, args.losses, True))
        if args.all_losses:
            plan.append((frozen, [name for name in LOSSES if name not in args.losses], False))
    return plan


def _is_right(case: dict[str, Any]) -> bool:
    return all(case["rows"].get(name, {}).get("status") in ("measured", "passed", None) for name in ("ours", REFERENCE))


def run_case(job: Job, builds: dict[str, Build], turns: Turns, *, is_timed: bool) -> dict[str, Any]:
    """Compare loss and gradients of all rows with TRL's on the job, and time those that agree."""
    sequences = len(job.frozen.lengths)
    batch_size = sequences if job.loss.why_one_batch else fitting(turns.batch_sizes, sequences)[0]
    case: dict[str, Any] = {
        "name": job.frozen.name,
        "loss": job.loss.name,
        "batch": describe(job.frozen),
        "rows": compare(job, builds, batch_size),
    }
    if job.loss.why_one_batch:
        case["one_batch"] = job.loss.why_one_batch
    if is_timed:
        measure(job, builds, case["rows"], turns)
    return case


if __name__ == "__main__":
    sys.exit(main())
