"""The command line of the kernel benchmark, bench/kernels.py: which cases, in which order, and what is written."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import describe_gpus, describe_machine
from bench.common.result_file import write_json
from bench.layers.contenders import CONFIG
from bench.layers.level import Case
from bench.layers.levels import LEVELS
from bench.layers.measured_case import Bench, run_case
from bench.layers.memory import preload
from bench.layers.policy_problems import CONFIGS
from bench.layers.problems import HEADS, action_mask
from bench.layers.suites import SUITES, Block
from bench.layers.tables import print_case

REPEATS = {"cpu": 3, "cuda": 20}


def main(arguments: list[str] | None = None) -> int:
    """Measure every case that the options name, write the results after each, print tables and draw plots.

    Returns 1 if one of this project's operators was refused or failed, else 0.
    """
    args = _parser().parse_args(arguments)
    cases = _cases(args)
    bench = Bench(
        torch.device(args.device), args.repeats or REPEATS[args.device], args.seed, args.memory, args.only, args.skip
    )
    result: dict[str, Any] = _header(args, cases)
    if bench.memory and any(one.package for case in cases for one in bench.chosen(case)):
        preload()
    started, wrong, ours = time.monotonic(), False, _groups()["ours"]
    for case in cases:
        if args.deadline is not None and time.monotonic() - started > args.deadline:
            print(f"deadline of {args.deadline} s reached, cases left out from {case.level}: {case.title}")
            result["left_out_from"] = f"{case.level}: {case.title}"
            break
        record = run_case(case, bench)
        result["cases"].append(record)
        wrong |= any(
            entry["status"] in ("refused", "failed") and name in ours for name, entry in record["contenders"].items()
        )
        print_case(record)
        result |= {"gpus_after": describe_gpus(), "wall_s": time.monotonic() - started}
        write_json(result, args.out)
    write_json(result, args.out)
    if args.plots:
        from bench.plots import draw

        print("drawn:", *draw(result, args.plots, args.out.stem if args.out else "kernels"))
    return int(wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure every layer of spear_kernels against other projects.")
    parser.add_argument("--suite", choices=SUITES, help="a named set of cases; --level and --shape narrow it down")
    parser.add_argument("--level", choices=LEVELS, nargs="+", help="what the operators are given and give")
    parser.add_argument("--shape", choices=HEADS, nargs="+", help="which heads; default cpu without --suite")
    parser.add_argument("--variant", nargs="+", help="kinds of loss, or operators of level batch; default all")
    parser.add_argument("--tokens", type=int, nargs="+", help="without --suite: rows of the batch")
    parser.add_argument("--active", type=float, nargs="+", help="without --suite: shares of action tokens")
    parser.add_argument("--live", type=float, nargs="+", help="without --suite: shares of those with an advantage")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the head's own")
    parser.add_argument("--only", type=_names, default=(), help="contenders, 'ours' or 'peers', separated by commas")
    parser.add_argument("--skip", type=_names, default=(), help="likewise, what to leave out")
    parser.add_argument("--repeats", type=int, help="timed steps of each contender; default 3 on the CPU, 20 on CUDA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, help="start no case later than this many seconds")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--plots", type=Path, help="folder for plots, which bench/plots.py draws again from the file")
    return parser


def _groups() -> dict[str, set[str]]:
    known = [contender for level in LEVELS.values() for contender in level.contenders]
    peers = {one.name for one in known if one.package}
    plain = {one.name for one in known if one.objective == "floor" or one.name.startswith("naive")}
    names = {one.name for one in known}
    return {"peers": peers, "ours": names - peers - plain, **{name: {name} for name in names}}


def _names(text: str) -> tuple[str, ...]:
    groups = _groups()
    unknown = set(text.split(",")) - groups.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; choose from {', '.join(sorted(groups))}")
    return tuple(sorted(set().union(*(groups[part] for part in text.split(",")))))


def _cases(args: argparse.Namespace) -> list[Case]:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.suite:
        if args.tokens or args.active or args.live:
            sys.exit("--tokens, --active and --live cannot change a suite; name --level and --shape instead of --suite")
        blocks = SUITES[args.suite]
    else:
        shares = (tuple(args.active or (1.0,)), tuple(args.live or (1.0,)))
        blocks = [_block(level, args, shares) for level in args.level or ("hidden",)]
    cases = [case for block in blocks for case in block.cases(dtype)]
    heads = [HEADS[name] for name in args.shape or ()]
    sizes = {(head.hidden_size, head.vocab_size) for head in heads}
    kept = [
        case
        for case in cases
        if (not args.level or case.level in args.level)
        and (not args.variant or not case.variant or case.variant in args.variant)
        and (not sizes or not case.shape.head.vocab_size
             or (case.shape.head.hidden_size, case.shape.head.vocab_size) in sizes)
    ]  # fmt: skip
    if not kept:
        sys.exit(f"no case of suite {args.suite} has level {args.level}, shape {args.shape}, variant {args.variant}")
    for case in kept:
        if not action_mask(case.shape, drop_last=case.level == "logits").any():
            sys.exit(f"{case.level}: {case.title}: no row is an action token; use more tokens or a larger --active")
    return kept


def _block(level: str, args: argparse.Namespace, shares: tuple[tuple[float, ...], tuple[float, ...]]) -> Block:
    has_head = LEVELS[level].variants == ("",)
    heads = tuple(args.shape or ("cpu",)) if has_head else ("",)
    return Block(level, heads, tuple(args.tokens or ((1024,) if has_head else (65536,))), *shares)


def _header(args: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    levels = {case.level for case in cases}
    packages = {one.package for name in levels for one in LEVELS[name].contenders if one.package}
    return {
        "benchmark": "kernels",
        "machine": describe_machine(sorted(packages)),
        "settings": {
            "suite": args.suite,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "seed": args.seed,
            "only": list(args.only),
            "skip": list(args.skip),
            "losses": {"hidden": asdict(CONFIG), **{kind: asdict(cfg) for kind, cfg in CONFIGS.items()}},
            "tests": os.environ.get("BENCH_TESTS", "not run in this session"),
            "load_average_before": os.getloadavg()[0],
        },
        "cases": [],
    }


if __name__ == "__main__":
    sys.exit(main())
