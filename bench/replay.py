"""The replay storage at a million trajectories: push, evict and recalibrate, draw, save, and what each costs in memory.

python bench/replay.py --out bench/results/cpu/replay.json
python bench/replay.py --trajectories 20000           # does it run?
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import cases
from bench.common.gpu_memory import settled_bytes
from bench.common.machine import describe_machine
from bench.storages.load import Load, Steps
from bench.storages.storages import BASELINE, Savable, Storage, storages
from spear_fast.replay.baseline import BaselineQueue

STEADY_STEPS = 3
"""Steps after the storage is full: each pushes one step's rows and makes those of the oldest step stale."""
PEERS = ("padded copies", "list of dicts")
CPU = torch.device("cpu")
Times = dict[str, list[float]]

COLUMNS: list[cases.Column] = [
    ("ms", cases.number("median_s", ".1f", 1e3)),
    ("spread", cases.number("spread", ".0%")),
    ("M trajectories/s", cases.number("trajectories_per_s", ".2f", 1e-6)),
    ("GB/s", cases.number("bytes_per_s", ".2f", 1e-9)),
    ("bytes/trajectory", cases.number("bytes_per_trajectory", ".0f")),
    ("times the payload", cases.number("payload_share", ".2f")),
]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write the result; 1 if the row of ours or the floor failed, else 0."""
    args = _parser().parse_args(arguments)
    load = Load(trajectories=args.trajectories, steps=args.steps, mean_tokens=args.mean_tokens, seed=args.seed)
    if load.trajectories < load.steps * load.group:
        raise SystemExit(f"--trajectories {args.trajectories} --steps {args.steps}: give {load.group} for each step")
    machine = describe_machine()
    rows = {name: measured_apart(name, load, args.draw, args.repeats) for name in chosen(args.only)}
    result = {
        "benchmark": "replay",
        "machine": machine,
        "settings": {"load": asdict(load), "draw": args.draw, "repeats": args.repeats, "steady_steps": STEADY_STEPS},
        "cases": [*as_cases(rows, load), baseline_case(args.repeats)],
    }
    cases.show(result, COLUMNS)
    cases.write(result, args.out)
    return int(cases.wrong(result, PEERS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=cases.positive, default=Load.trajectories)
    parser.add_argument("--steps", type=cases.positive, default=Load.steps, help="training steps that fill the storage")
    parser.add_argument("--mean-tokens", type=float, default=Load.mean_tokens)
    parser.add_argument("--draw", type=cases.positive, default=16_384, help="trajectories of a draw")
    parser.add_argument("--repeats", type=cases.positive, default=3, help="of draw, save and load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of storages, without spaces (list-of-dicts)")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser


def chosen(only: list[str] | None) -> list[str]:
    """The storages that are asked for, and the floor."""
    names = ["payload copy", *storages(0, 0, 0)]
    unknown = set(only or []) - {name.replace(" ", "-") for name in names}
    if unknown:
        raise SystemExit(f"--only {sorted(unknown)}: there are {[name.replace(' ', '-') for name in names]}")
    return [name for name in names if only is None or name.replace(" ", "-") in only]


def measured_apart(name: str, load: Load, draw: int, repeats: int) -> dict[str, Any]:
    """Measure one storage in a process of its own, whose memory no other has touched."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_here, name, load, draw, repeats).result()
        except Exception as error:  # the others go on; the row says so
            return {"push": cases.unmeasured(error)}


def measure_here(name: str, load: Load, draw: int, repeats: int) -> dict[str, Any]:
    """Measure one storage in this process, which does nothing else."""
    gc.disable()  # nothing here has cycles, and a pause would be charged to whoever runs then
    return payload_copy(load) if name == "payload copy" else measure(name, load, draw, repeats)


def measure(name: str, load: Load, draw: int, repeats: int) -> dict[str, Any]:
    """Rows of one storage by operation: filled step by step, then in a steady state, then drawn from and saved."""
    storage, steps, times = storages(draw, load.steps - 1, load.longest)[name](), Steps(load), Times()
    before, payload = settled_bytes(CPU), 0
    for index in range(load.steps):
        payload += fill(storage, steps, index, times.setdefault("push", []))
    held = settled_bytes(CPU) - before
    size, eligible = clocked(times, "recalibrate", lambda: storage.scan(load.steps - 1))
    for _ in range(repeats - 1):
        clocked(times, "recalibrate", lambda: storage.scan(load.steps - 1))
    if size != load.stored or not 0 < eligible < size:
        raise ValueError(f"{name} holds {size} of {load.stored} trajectories, of which {eligible} are eligible")
    for index in range(load.steps, load.steps + STEADY_STEPS):
        fill(storage, steps, index, times.setdefault("steady push", []))
        size, _ = clocked(times, "steady evict", lambda index=index: storage.scan(index))
        if size != load.stored:
            raise ValueError(f"{name} holds {size} of {load.stored} trajectories after eviction")
    draw_and_save(storage, load, min(draw, eligible), repeats, times)
    rows = {operation: cases.measured(taken) for operation, taken in times.items()}
    push = rows["push"]
    push |= {"trajectories_per_s": load.stored / sum(push["times_s"]), "bytes_per_s": payload / sum(push["times_s"])}
    push |= {"resident_bytes": held, "payload_bytes": payload, "payload_share": held / payload}
    push["bytes_per_trajectory"] = held / load.stored
    return rows


def fill(storage: Storage, steps: Steps, index: int, times: list[float]) -> int:
    """Push a step and return the bytes of its payload; only the push is timed."""
    prepared = storage.prepare(steps.make(index))
    started = time.perf_counter()
    storage.push(prepared)
    times.append(time.perf_counter() - started)
    return steps.payload_bytes(index)


def draw_and_save(storage: Storage, load: Load, expected: int, repeats: int, times: Times) -> None:
    """Time draws, each from the same full storage, and where there is a form for it, saving and loading."""
    version, snapshot = load.steps + STEADY_STEPS - 1, storage.snapshot()
    for seed in range(repeats):
        storage.restore(snapshot)
        drawn = clocked(times, "draw", lambda seed=seed: storage.draw(version, seed))
        if not 0.9 * expected <= drawn <= 1.1 * expected:
            raise ValueError(f"a draw brought {drawn} trajectories instead of {expected}")
    storage.restore(snapshot)
    del snapshot
    if isinstance(storage, Savable):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "replay.npz"
            for _ in range(repeats):
                clocked(times, "save", lambda: storage.save(file))
                clocked(times, "load", lambda: storage.load(file))


def clocked(times: Times, operation: str, work: Callable[[], Any]) -> Any:
    """Return `work()` and note the seconds that it took."""
    started = time.perf_counter()
    result = work()
    times.setdefault(operation, []).append(time.perf_counter() - started)
    return result


def payload_copy(load: Load) -> dict[str, Any]:
    """The floor: copying a step's bytes into fresh memory, step by step, and holding nothing else."""
    steps, before, times, held = Steps(load), settled_bytes(CPU), [], []
    for index in range(load.steps):
        source = np.ones(steps.payload_bytes(index), dtype=np.uint8)
        started = time.perf_counter()
        held.append(source.copy())
        times.append(time.perf_counter() - started)
    del source
    payload, resident = sum(map(len, held)), settled_bytes(CPU) - before
    row = cases.measured(times, trajectories_per_s=load.stored / sum(times), bytes_per_s=payload / sum(times))
    row |= {"resident_bytes": resident, "payload_bytes": payload, "payload_share": resident / payload}
    return {"push": row | {"bytes_per_trajectory": payload / load.stored}}


def as_cases(rows: dict[str, dict[str, Any]], load: Load) -> list[dict[str, Any]]:
    """One case per operation, in the order in which they are done."""
    titles = {
        "push": f"push {load.per_step} trajectories of a step, {load.steps} times",
        "recalibrate": f"recalibrate and filter {load.stored} trajectories, none stale",
        "steady push": f"push a step into a storage of {load.stored}",
        "steady evict": f"evict a stale step of {load.stored}, recalibrate and filter the rest",
        "draw": "draw without replacement, and empty the storage",
        "save": "save in a checkpoint",
        "load": "load from a checkpoint",
    }
    found = [
        {"name": title, "rows": {name: parts[key] for name, parts in rows.items() if key in parts}}
        for key, title in titles.items()
    ]
    return [case for case in found if case["rows"]]


def baseline_case(repeats: int) -> dict[str, Any]:
    """The reward baseline D_R: push the means of a step's groups and take both medians."""
    rng, per_step = np.random.default_rng(0), 256
    queue = BaselineQueue(BASELINE)
    means, stds = rng.random((2, BASELINE))
    queue.push(means, stds)
    times: Times = {}

    def push_and_read() -> float:
        queue.push(means[:per_step], stds[:per_step])
        return queue.median_mean() + queue.median_std()

    for _ in range(10 * repeats + 1):
        if not math.isfinite(clocked(times, "baseline", push_and_read)):
            raise ValueError("the baseline's median is not finite")
    name = f"baseline FIFO of {BASELINE} groups: push {per_step}, medians of means and deviations"
    return {"name": name, "rows": {"ours": cases.measured(times["baseline"][1:])}}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result for a README."""
    return cases.markdown_tables(result, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
