"""Measures one case of the kernel benchmark: first whether each contender is right, then memory, then time."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.common.machine import package_version
from bench.layers.contenders import Contender, Step
from bench.layers.gate import complaint
from bench.layers.level import Case, contenders_of
from bench.layers.levels import LEVELS
from bench.layers.measure import alternate, clear_gradients, copies_for_cache, run_step
from bench.layers.memory import peak_of

# Rows whose log-probs and gradients are compared with float64 at the measured size.
CHECKED_ROWS = 256
SHORT_REPEATS = 5
"""How many times more often steps of a short level are repeated."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How to measure, and the gates passed so far, by level, variant, type and contender."""

    device: torch.device
    repeats: int
    seed: int = 0
    memory: bool = True
    only: tuple[str, ...] = ()
    """Names of contenders; empty for all."""
    skip: tuple[str, ...] = ()
    gates: dict[tuple[str, str, torch.dtype, str], Entry] = field(default_factory=dict)

    def chosen(self, case: Case) -> list[Contender]:
        """The contenders of a case, in a fixed order; the floor always, because shares refer to it."""
        floor, *others = contenders_of(LEVELS[case.level], case.variant)
        return [
            floor,
            *(one for one in others if (not self.only or one.name in self.only) and one.name not in self.skip),
        ]

    def gate(self, contender: Contender, case: Case) -> Entry:
        """Build a contender and compare it with float64 on a small problem, once for each level, variant and type.

        The entry's status is "passed" (with its `step`), "refused", "failed", "not installed" or "needs CUDA".
        """
        key = (case.level, case.variant, case.shape.head.dtype, contender.name)
        if key not in self.gates:
            self.gates[key] = gated(contender, case, self.device, self.seed)
        return dict(self.gates[key])


def gated(contender: Contender, case: Case, device: torch.device, seed: int) -> Entry:
    """See `Bench.gate`."""
    entry: Entry = {"computes": contender.computes}
    if contender.package:
        entry["package"] = f"{contender.package} {package_version(contender.package)}"
    if device.type not in contender.devices:
        return entry | {"status": "needs CUDA"}
    level = LEVELS[case.level]
    try:
        step = contender.build(device)
        problem = level.gate_problem(case, device, seed)
        outcome = run_step(step, problem, level.has_backward)
        if contender.objective == "floor":
            return entry | {"status": "passed", "step": step}
        errors = level.errors(outcome, problem, level.truth(problem, contender.objective, None))
    except ImportError as error:
        return entry | {"status": "not installed", "reason": str(error), "install": contender.install}
    except Exception as error:  # another project's operator may fail in any way; the rest goes on
        return entry | failure(error)
    reason = complaint(errors, case.shape.head.dtype)
    entry |= {"gate": errors}
    return entry | ({"status": "refused", "reason": reason} if reason else {"status": "passed", "step": step})


def run_case(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure those that passed their gate and are right at this size too; return the case's record."""
    level, contenders = LEVELS[case.level], bench.chosen(case)
    problem = level.problem(case, bench.device, bench.seed)
    entries, steps, truths = {}, {}, {}
    for contender in contenders:
        entry = entries[contender.name] = bench.gate(contender, case)
        step = entry.pop("step", None)
        if step is None:
            continue
        if contender.objective not in ("floor", *truths):
            truths[contender.objective] = level.truth(problem, contender.objective, CHECKED_ROWS)
        entry |= _checked(step, case, problem, truths.get(contender.objective))
        if entry["status"] == "passed":
            steps[contender.name] = step
            if bench.memory and contender.objective != "floor":
                entry |= peak_of(contender, step, problem, case, bench.seed)
    _time(contenders, steps, entries, problem, case, bench)
    _add_floor_shares(entries, contenders[0].name)
    return {**_describe(case, problem, bench), "contenders": entries}


def failure(error: Exception) -> Entry:
    """What an entry says of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _checked(step: Step, case: Case, problem: Any, truth: Any) -> Entry:
    """Run once at the measured size, which also warms up, and compare some rows with float64."""
    level = LEVELS[case.level]
    try:
        outcome = run_step(step, problem, level.has_backward)
        if truth is None:
            return {}
        errors = level.errors(outcome, problem, truth)
    except Exception as error:  # see gated()
        return failure(error)
    finally:
        outcome = None
        clear_gradients(problem)
        gc.collect()
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()
    reason = complaint(errors, case.shape.head.dtype)
    return {"errors": errors, **({"status": "refused", "reason": reason} if reason else {})}


def _time(
    contenders: list[Contender],
    steps: dict[str, Step],
    entries: dict[str, Entry],
    problem: Any,
    case: Case,
    bench: Bench,
) -> None:
    """Add times and rates to the entries of `steps`: with gradients, then of the forward pass alone as `forward`."""
    level = LEVELS[case.level]
    problems, by_name = problem.rotated(copies_for_cache(problem)), {one.name: one for one in contenders}
    repeats = bench.repeats * (SHORT_REPEATS if level.is_short else 1)
    for backward in (True, False) if level.has_backward else (False,):
        passing = {name: step for name, step in steps.items() if entries[name]["status"] in ("passed", "measured")}
        for name in [name for name in passing if by_name[name].compiled and level.has_backward and not backward]:
            # Without gradients there is another graph to compile; a failure shows again, and is recorded, when timed.
            with suppress(Exception):
                run_step(passing[name], problem, backward)
        for name, times in alternate(passing, problems, repeats, backward, level.is_short).items():
            if isinstance(times, Exception):
                entries[name] |= failure(times)
                continue
            work = level.least_work(by_name[name], problem, backward)
            figures = {"times_s": times, **_speed(times, *work)}
            nested = level.has_backward and not backward
            entries[name] |= {"forward": figures} if nested else {"status": "measured", **figures}


def _speed(times: list[float], flops: int, moved: int) -> dict[str, float]:
    """Median, spread and rates; a rate counts the least work of the case, whatever the contender really did."""
    typical = median(times)
    rates = {"median_s": typical, "fastest_s": min(times), "slowest_s": max(times)}
    if flops:
        rates["tflop_per_s"] = flops / typical / 1e12
    return rates | {"gb_per_s": moved / typical / 1e9}


def _add_floor_shares(entries: dict[str, Entry], name: str) -> None:
    """How near to the floor: time of the products over time, or bandwidth over that of a copy."""
    floor = entries[name]
    if floor["status"] != "measured":
        return
    for entry in entries.values():
        if entry["status"] != "measured":
            continue
        for part, limit in ((entry, floor), (entry.get("forward"), floor.get("forward"))):
            if part is None or limit is None:
                continue
            if "tflop_per_s" in limit:
                part["floor_share"] = limit["median_s"] / part["median_s"]
            else:
                part["floor_share"] = part["gb_per_s"] / limit["gb_per_s"]


def _describe(case: Case, problem: Any, bench: Bench) -> dict[str, Any]:
    shape = case.shape
    described = {
        "level": case.level,
        "title": case.title,
        "variant": case.variant,
        "num_rows": shape.num_rows,
        "num_seqs": shape.num_seqs,
        "active_share": shape.active,
        "live_share": shape.live,
        "dtype": str(shape.head.dtype).removeprefix("torch."),
        "gradient_bytes": sum(leaf.nbytes for leaf in problem.leaves) if LEVELS[case.level].has_backward else 0,
        "repeats": bench.repeats * (SHORT_REPEATS if LEVELS[case.level].is_short else 1),
    }
    if shape.head.vocab_size:
        described |= {"hidden_size": shape.head.hidden_size, "vocab_size": shape.head.vocab_size}
    for name in ("num_active", "num_live"):
        if hasattr(problem, name):
            described[name] = getattr(problem, name)
    return described
