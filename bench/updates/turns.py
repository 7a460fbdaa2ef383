"""Trainers take turns on one job: each is compared with the first one's gradients, and those that agree are timed."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from bench.common.failures import failed_row
from bench.updates.frozen import Frozen
from bench.updates.gate import complaint, distances
from bench.updates.job import Gradients, Job, Phases, Trainer, restored_module

Build = Callable[[Job, int], Trainer]
"""Makes a trainer for a job that puts this many sequences, at most, through one forward pass."""
Entry = dict[str, Any]
T = TypeVar("T")
REFERENCE = "trl"
"""The row whose gradients and times the others are compared with."""
UNSIZED = ("ours",)
"""Rows that have no batch size, since they fill micro-batches by tokens."""


@dataclass(frozen=True)
class Turns:
    """How often to measure."""

    rounds: int
    repeats: int
    """Timed steps of each round, after one that is not timed."""
    batch_sizes: tuple[int, ...]


def use(build: Build, job: Job, batch_size: int, work: Callable[[Trainer], T]) -> T:
    """`work` on a trainer that is made for it and gone after it, so that no two hold memory at once."""
    model_type = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    try:
        with restored_module(model_type):
            trainer = build(job, batch_size)
            try:
                return work(trainer)
            finally:
                trainer.close()
    finally:
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def attempt(entry: Entry, work: Callable[[], T]) -> T | None:
    """`work()`; if it fails, None, and the entry says so: one row's failure must not end the others."""
    try:
        return work()
    except Exception as error:  # other projects may fail in any way
        entry |= failed_row(error)
    return None


def fitting(wanted: Sequence[int], sequences: int) -> tuple[int, ...]:
    """The wanted batch sizes that divide the batch, ascending; the whole batch if none does."""
    return tuple(size for size in sorted(set(wanted)) if sequences % size == 0) or (sequences,)


def compare(job: Job, builds: Mapping[str, Build], batch_size: int) -> dict[str, Entry]:
    """An entry for each row: "passed" with the distances of its loss and gradients, "refused", "failed", ...

    Without the reference there is nothing to compare with, and none passes.
    """
    expected: Gradients | None = None
    entries: dict[str, Entry] = {}
    for name in sorted(builds, key=lambda name: name != REFERENCE):
        entry = entries[name] = {}
        found = attempt(
            entry, lambda name=name: use(builds[name], job.unclipped(), batch_size, lambda one: one.gradients())
        )
        if found is None:
            continue
        if name == REFERENCE:
            expected = found
            entry["status"] = "passed"
        elif expected is None:
            entry |= {"status": "refused", "reason": f"no gradients of {REFERENCE} to compare with"}
        else:
            entry["gate"] = distances(found, expected)
            reason = complaint(entry["gate"], job.dtype)
            entry |= {"status": "refused", "reason": reason} if reason else {"status": "passed"}
    return {name: entries[name] for name in builds}


def measure(job: Job, builds: Mapping[str, Build], entries: dict[str, Entry], turns: Turns) -> None:
    """Add times and rates to the entries that passed.

    First each is tried with every batch size, then all take turns, every second round in reverse order.
    """
    passed = [name for name, entry in entries.items() if entry["status"] == "passed"]
    sizes = fitting(turns.batch_sizes, len(job.frozen.lengths))
    if job.loss.why_one_batch:
        sizes = (len(job.frozen.lengths),)
    best = {name: _best_size(job, builds[name], sizes, entries[name], name) for name in passed}
    taken: dict[str, list[Phases]] = {name: [] for name in passed}
    for turn in range(turns.rounds):
        for name in passed[:: -1 if turn % 2 else 1]:
            if entries[name]["status"] == "passed":
                steps = attempt(
                    entries[name],
                    lambda name=name: use(
                        builds[name], job, best[name], lambda one: _turn(one, entries[name], job.device, turns.repeats)
                    ),
                )
                taken[name] += steps or []
    for name in passed:
        if entries[name]["status"] == "passed":
            scoring = {"scoring_s": median(entries[name]["scoring_times_s"])}
            entries[name] |= {"status": "measured", **_summary(taken[name], job.frozen), **scoring}
    _relate(entries)


def _turn(trainer: Trainer, entry: Entry, device: str, repeats: int) -> list[Phases]:
    """One turn of a trainer; the entry gets its settings, the time of scoring, and on CUDA its peak of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = trainer.steps(1 + repeats)[1:]
    if device == "cuda":
        entry["peak_bytes"] = max(entry.get("peak_bytes", 0), torch.cuda.max_memory_allocated())
    entry["settings"] = trainer.settings
    entry.setdefault("scoring_times_s", []).append(trainer.score())
    return steps


def _best_size(job: Job, build: Build, sizes: Sequence[int], entry: Entry, name: str) -> int:
    """The batch size with the fastest second step (the first is cold); times, or why one failed, go to the entry."""
    if len(sizes) == 1 or name in UNSIZED:
        return sizes[-1]
    tried: dict[int, float] = {}
    entry["tried_batch_sizes"] = {}
    for size in sizes:
        failure: Entry = {}
        steps = attempt(failure, lambda size=size: use(build, job, size, lambda one: one.steps(2)[1:]))
        if steps:
            tried[size] = steps[0]["total"]
        entry["tried_batch_sizes"][str(size)] = steps[0]["total"] if steps else failure["reason"]
    return min(tried, key=tried.__getitem__) if tried else sizes[-1]


def _summary(steps: Sequence[Phases], frozen: Frozen) -> Entry:
    """Median and spread (slowest / fastest - 1) of the steps, medians of their phases, and tokens per second."""
    times = [step["total"] for step in steps]
    middle = median(times)
    return {
        "median_s": middle,
        "spread": max(times) / min(times) - 1,
        "times_s": times,
        "phases_s": {name: median(step[name] for step in steps) for name in steps[0] if name != "total"},
        "action_tokens_per_s": frozen.num_action_tokens / middle,
        "tokens_per_s": frozen.num_tokens / middle,
    }


def _relate(entries: dict[str, Entry]) -> None:
    """Add how many times faster than the reference each measured row is."""
    reference = entries.get(REFERENCE, {}).get("median_s")
    for entry in entries.values():
        if reference is not None and "median_s" in entry:
            entry["speedup"] = reference / entry["median_s"]
