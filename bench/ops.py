"""Time, memory and error of the loss operators, of plain torch and of other projects' operators, on the same inputs.

python bench/ops.py --shape cpu --device cpu --out bench/results/cpu/ops.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.contenders import CONFIG, OWN, Contender, Step
from bench.gate import Truth, complaint, errors_of, gate_problem, truth_of
from bench.machine import describe_gpus, describe_machine, package_version
from bench.measure import alternate, copies_for_cache, cuda_peak, resident_peak, run_step
from bench.peers import PEERS
from bench.problems import DEFAULT_TOKENS, HEADS, Problem, Shape, logits_bytes, loss_bytes, loss_flops, make_problem

GROUPS = {
    "ours": ("linear_policy_loss", "linear_policy_loss_on_device", "linear_logprob", "logprob"),
    "peers": tuple(peer.name for peer in PEERS),
}
REPEATS = {"cpu": 3, "cuda": 20}
# Rows whose log-probs and gradients are compared with float64 at the measured size.
CHECKED_ROWS = 256
FLOOR = {"hidden": "floor", "logits": "copy"}


@dataclass(frozen=True)
class Options:
    """How to measure: repetitions, where, and whether memory is measured too."""

    device: torch.device
    level: str
    repeats: int
    seed: int
    memory: bool = True


def main(arguments: list[str] | None = None) -> int:
    """Measure every case that the options name, write the results after each, and print a table.

    Returns 1 if one of this project's operators or plain torch was refused or failed, else 0.
    """
    args = _parser().parse_args(arguments)
    options = Options(
        torch.device(args.device), args.level, args.repeats or REPEATS[args.device], args.seed, args.memory
    )
    shapes = _shapes(args)
    if args.memory_of:
        print(json.dumps({"peak_extra_bytes": memory_of(_named(args.memory_of, args.level), shapes[0], options)}))
        return 0
    contenders = chosen(args.level, args.only, args.skip)
    gates = {contender.name: gated(contender, shapes[0].head.dtype, options) for contender in contenders}
    result: dict[str, Any] = _header(args, contenders)
    started, wrong = time.monotonic(), False
    for shape in shapes:
        if args.deadline and time.monotonic() - started > args.deadline:
            print(f"deadline of {args.deadline} s reached, cases left out from {_title(shape)}")
            result["left_out_from"] = _title(shape)
            break
        case = run_case(contenders, gates, shape, options)
        result["cases"].append(case)
        wrong |= any(case["contenders"].get(one.name, {}).get("status") in ("refused", "failed") for one in OWN)
        result["gpus_after"] = describe_gpus()
        print(table(case), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the loss operators against plain torch and other projects.")
    parser.add_argument("--shape", choices=HEADS, default="cpu", help="which head")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the head's own")
    parser.add_argument("--level", choices=("hidden", "logits"), default="hidden", help="what the operators are given")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of the batch; several make several cases")
    parser.add_argument("--active", type=float, nargs="+", default=[1.0], help="shares of action tokens")
    parser.add_argument("--live", type=float, nargs="+", default=[1.0], help="shares of those with an advantage")
    parser.add_argument("--only", type=_names, default=(), help="names, 'ours' or 'peers', separated by commas")
    parser.add_argument("--skip", type=_names, default=(), help="likewise, what to leave out")
    parser.add_argument("--repeats", type=int, help="timed steps of each contender; default 3 on the CPU, 20 on CUDA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, help="start no case later than this many seconds")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def _names(text: str) -> tuple[str, ...]:
    known = {contender.name for contender in (*OWN, *PEERS)}
    names = [name for part in text.split(",") for name in GROUPS.get(part, (part,))]
    unknown = set(names) - known
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(sorted(known))}")
    return tuple(names)


def _shapes(args: argparse.Namespace) -> list[Shape]:
    head = HEADS[args.shape]
    if args.dtype:
        head = replace(head, dtype=getattr(torch, args.dtype))
    tokens = args.tokens or [DEFAULT_TOKENS.get(args.shape, 4096)]
    return [Shape(head, n, active, live) for n in tokens for active in args.active for live in args.live]


def chosen(level: str, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[Contender]:
    """The contenders of a level, in a fixed order; the floor always, because shares refer to it."""
    return [
        contender
        for contender in (*OWN, *PEERS)
        if contender.level == level
        and (contender.name == FLOOR[level] or ((not only or contender.name in only) and contender.name not in skip))
    ]


def _named(name: str, level: str) -> Contender:
    return next(contender for contender in (*OWN, *PEERS) if (contender.name, contender.level) == (name, level))


def gated(contender: Contender, dtype: torch.dtype, options: Options) -> dict[str, Any]:
    """Build a contender and compare it with float64 on a small problem.

    The entry's status is "passed" (with its `step`), "refused", "failed", "not installed" or "needs CUDA".
    """
    entry: dict[str, Any] = {"computes": contender.computes}
    if contender.package:
        entry["package"] = f"{contender.package} {package_version(contender.package)}"
    if options.device.type not in contender.devices:
        return entry | {"status": "needs CUDA"}
    try:
        step = contender.build(options.device)
        problem = gate_problem(dtype, options.device, options.level, options.seed)
        outcome = run_step(step, problem)
        if contender.objective == "products":
            return entry | {"status": "passed", "step": step}
        errors = errors_of(outcome, problem, truth_of(problem, contender.objective))
    except ImportError as error:
        return entry | {"status": "not installed", "reason": str(error), "install": contender.install}
    except Exception as error:  # another project's operator may fail in any way; the rest goes on
        return entry | _failure(error)
    reason = complaint(errors, dtype)
    entry |= {"gate": errors}
    return entry | ({"status": "refused", "reason": reason} if reason else {"status": "passed", "step": step})


def run_case(
    contenders: list[Contender], gates: dict[str, dict[str, Any]], shape: Shape, options: Options
) -> dict[str, Any]:
    """Measure those that passed their gate and are right at this size too; return the case's record."""
    problem = make_problem(shape, options.device, options.seed, options.level)
    entries = {contender.name: dict(gates[contender.name]) for contender in contenders}
    steps: dict[str, Step] = {}
    truths = {objective: truth_of(problem, objective, CHECKED_ROWS) for objective in ("ppo", "cross_entropy")}
    for contender in contenders:
        entry = entries[contender.name]
        step = entry.pop("step", None)
        if step is None:
            continue
        entry |= _checked(step, problem, truths.get(contender.objective))
        if entry["status"] == "passed":
            steps[contender.name] = step
            if options.memory:
                entry |= _peak(contender, step, problem, options)
    _measure(contenders, steps, entries, problem, options)
    _add_floor_shares(entries, options.level)
    return {**_describe_case(problem, options), "contenders": entries}


def _measure(
    contenders: list[Contender],
    steps: dict[str, Step],
    entries: dict[str, dict[str, Any]],
    problem: Problem,
    options: Options,
) -> None:
    """Add times and rates to the entries of `steps`; from logits also those of the forward pass alone."""
    problems, by_name = problem.rotated(copies_for_cache(problem)), {one.name: one for one in contenders}
    for backward in (True, False) if options.level == "logits" else (True,):
        passing = {name: step for name, step in steps.items() if entries[name]["status"] in ("passed", "measured")}
        for name, times in alternate(passing, problems, options.repeats, backward).items():
            if isinstance(times, Exception):
                entries[name] |= _failure(times)
                continue
            figures = {"times_s": times, **_speed(by_name[name], times, problem, backward)}
            entries[name] |= {"status": "measured", **figures} if backward else {"forward": figures}


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _checked(step: Step, problem: Problem, truth: Truth | None) -> dict[str, Any]:
    """Run once at the measured size, which also warms up, and compare some rows with float64."""
    try:
        outcome = run_step(step, problem)
        if truth is None:
            return {}
        errors = errors_of(outcome, problem, truth)
    except Exception as error:  # see gated()
        return _failure(error)
    finally:
        _release_memory(problem)
    reason = complaint(errors, problem.shape.head.dtype)
    return {"errors": errors, **({"status": "refused", "reason": reason} if reason else {})}


def _release_memory(problem: Problem) -> None:
    for leaf in problem.leaves:
        leaf.grad = None
    gc.collect()
    if problem.ids.device.type == "cuda":
        torch.cuda.empty_cache()


def _peak(contender: Contender, step: Step, problem: Problem, options: Options) -> dict[str, Any]:
    """Peak bytes beyond the inputs, gradients included; on the CPU from a fresh process, or why there is no figure."""
    if options.device.type == "cuda":
        return {"peak_extra_bytes": cuda_peak(step, problem)}
    shape = problem.shape
    name = next(name for name, head in HEADS.items() if replace(head, dtype=shape.head.dtype) == shape.head)
    command = [sys.executable, __file__, "--memory-of", contender.name, "--shape", name, "--level", options.level]
    command += ["--tokens", str(shape.num_rows), "--active", str(shape.active), "--live", str(shape.live)]
    command += ["--seed", str(options.seed), "--dtype", str(shape.head.dtype).removeprefix("torch.")]
    # Freed blocks must go back to the system at once, or they would hide what is allocated after them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return {"no_memory_figure": done.stderr.strip()[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(contender: Contender, shape: Shape, options: Options) -> int:
    """In a process of its own: how far one step raises the resident memory, after a small step that warms up."""
    step = contender.build(options.device)
    run_step(step, gate_problem(shape.head.dtype, options.device, options.level, options.seed))
    problem = make_problem(shape, options.device, options.seed, options.level)
    return resident_peak(lambda: run_step(step, problem))


def _speed(contender: Contender, times: list[float], problem: Problem, backward: bool) -> dict[str, float]:
    """Median, spread and rates; a rate counts the least work of the case, whatever the contender really did."""
    typical = median(times)
    rates = {"median_s": typical, "fastest_s": min(times), "slowest_s": max(times)}
    flops, moved = _least_work(contender, problem, backward)
    if flops:
        rates["tflop_per_s"] = flops / typical / 1e12
    return rates | {"gb_per_s": moved / typical / 1e9}


def _least_work(contender: Contender, problem: Problem, backward: bool) -> tuple[int, int]:
    """FLOPs and bytes that the contender's result needs at least."""
    shape, num_active, num_live = problem.shape, problem.num_active, problem.num_live
    if contender.name == "copy":
        return 0, 2 * logits_bytes(shape.num_rows, shape.head, backward=False)
    if problem.logits is not None:
        return 0, logits_bytes(shape.num_rows, shape.head, backward)
    if contender.name == "floor_dense":
        num_active = num_live = shape.num_rows
    elif contender.objective == "cross_entropy":
        num_live = num_active
    return loss_flops(num_active, num_live, shape.head), loss_bytes(num_active, num_live, shape.head)


def _add_floor_shares(entries: dict[str, dict[str, Any]], level: str) -> None:
    """How near to the floor: time of the products over time; at logits level, bandwidth over that of a copy."""
    floor = entries[FLOOR[level]]
    if floor["status"] != "measured":
        return
    for entry in entries.values():
        if entry["status"] != "measured":
            continue
        if level == "hidden":
            entry["floor_share"] = floor["median_s"] / entry["median_s"]
        else:
            entry["floor_share"] = entry["gb_per_s"] / floor["gb_per_s"]
            if "forward" in entry:
                entry["forward"]["floor_share"] = entry["forward"]["gb_per_s"] / floor["forward"]["gb_per_s"]


def _header(args: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    packages = sorted({contender.package for contender in contenders if contender.package})
    return {
        "machine": describe_machine(packages),
        "threads": torch.get_num_threads(),
        "device": args.device,
        "level": args.level,
        "seed": args.seed,
        "loss": {"kind": CONFIG.kind, "clip_low": CONFIG.clip_low, "clip_high": CONFIG.clip_high,
                 "dual_clip": CONFIG.dual_clip, "aggregation": CONFIG.aggregation},
        "tests": os.environ.get("BENCH_TESTS", "not run in this session"),
        "cases": [],
    }  # fmt: skip


def _describe_case(problem: Problem, options: Options) -> dict[str, Any]:
    shape = problem.shape
    return {
        "title": _title(shape),
        "hidden_size": shape.head.hidden_size,
        "vocab_size": shape.head.vocab_size,
        "dtype": str(shape.head.dtype).removeprefix("torch."),
        "num_rows": shape.num_rows,
        "num_active": problem.num_active,
        "num_live": problem.num_live,
        "gradient_bytes": sum(leaf.nbytes for leaf in problem.leaves),
        "repeats": options.repeats,
    }


def _title(shape: Shape) -> str:
    head = f"H {shape.head.hidden_size} V {shape.head.vocab_size} {str(shape.head.dtype).removeprefix('torch.')}"
    return f"N {shape.num_rows} {head} active {shape.active:g} live {shape.live:g}"


def table(case: dict[str, Any]) -> str:
    """The case as lines of text; "floor" is the share of the floor's speed."""
    titles = ("ms", "spread", "floor", "TFLOP/s", "GB/s", "MiB", "lp p99", "grad")
    lines = [case["title"], f"{'':29}{''.join(f'{title:>9}' for title in titles)}"]
    for name, entry in case["contenders"].items():
        if entry["status"] != "measured":
            reason = entry.get("install") or entry.get("reason", "")
            lines.append(f"{name:29} {entry['status']}{': ' if reason else ''}{reason}")
            continue
        lines.append(f"{name:29}{_cells(entry)}")
        if "forward" in entry:
            lines.append(f"{'  forward alone':29}{_cells(entry['forward'])}")
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any]) -> str:
    errors, peak = entry.get("errors", {}), entry.get("peak_extra_bytes")
    values = (
        (entry["median_s"] * 1e3, ".2f"),
        (entry["slowest_s"] / entry["fastest_s"] - 1, ".0%"),
        (entry.get("floor_share"), ".2f"),
        (entry.get("tflop_per_s"), ".3g"),
        (entry["gb_per_s"], ".3g"),
        (None if peak is None else peak / 2**20, ".0f"),
        (errors.get("logp_p99"), ".0e"),
        (errors.get("gradient"), ".0e"),
    )
    return "".join(f"{'' if value is None else format(value, form):>9}" for value, form in values)


if __name__ == "__main__":
    sys.exit(main())
