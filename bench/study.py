"""Compares GRPO, Dr.BoT and GiGPO with and without SPEAR on one task family: equal starts, equal environment steps.

python bench/study.py configs/study/babyai.yaml --arms full ablations --seeds 0 1 2 --env-steps 12000 \\
    --work runs/study-babyai --out bench/results/cpu/study_babyai.json

The policy of a seed is cold-started once and all its runs start from it. A study that was interrupted goes on where it
was, run by run and within a run, when called again with the same --work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.machine import ROOT, describe_machine
from bench.common.result_file import write_json
from bench.studies import arms
from bench.studies.curves import draw
from bench.studies.records import summarise
from bench.studies.tables import markdown
from spear_fast.log.records import METRICS_FILE, read_records

RUN = Path(__file__).with_name("studies") / "run.py"
DONE = "study.json"
"""File in a run's folder that holds its summary once it is over."""


@dataclass(frozen=True)
class Study:
    """What is common to all runs of a study."""

    config: Path
    work: Path
    env_steps: int
    threads: int
    options: tuple[str, ...]

    def start(self, seed: int) -> None:
        """Cold-start the policy of a seed."""
        self._finish(f"start-{seed}", [*self.options, f"seed={seed}", "steps=0"])

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm from the policy of its seed and return the run's summary."""
        model = self.work / f"start-{seed}" / "start_model"
        start = [f"model.path={model}", "cold_start.steps=0"]
        return self._finish(run_name(arm, seed), [*self.options, f"seed={seed}", *start, *arms.overrides(arm)])

    def _finish(self, name: str, options: Sequence[str]) -> dict[str, Any]:
        folder = self.work / name
        summary = folder / DONE
        asked = [self.config.read_text(encoding="utf-8"), str(self.env_steps), *options]
        if not summary.exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(RUN), str(self.config), "--env-steps", str(self.env_steps)]
            command += [*options, f"name={name}", f"out={self.work}", "log.tensorboard=false"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            with (folder / "output.txt").open("a") as output:
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            if done.returncode:
                last = (folder / "output.txt").read_text(encoding="utf-8").splitlines()[-20:]
                raise SystemExit("\n".join([f"the run {name} failed; {folder}/output.txt ends with", *last]))
            write_json({"asked": asked, "summary": summarise(read_records(folder / METRICS_FILE))}, summary)
        done = json.loads(summary.read_text(encoding="utf-8"))
        if done["asked"] != asked:
            raise SystemExit(f"--work {self.work}: {name} was run with other settings; give another folder")
        return done["summary"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, write its file and picture, and print its tables."""
    args = _arguments(argv)
    chosen = list(dict.fromkeys(arm for name in args.arms for arm in arms.SETS.get(name, [name])))
    for arm in chosen:
        arms.overrides(arm)
    if any(":" in arm for arm in chosen):
        # What a part is worth is told against all parts.
        chosen = list(dict.fromkeys([*chosen, f"{arms.ABLATED}+spear"]))
    work = args.work.resolve()
    study = Study(
        args.config.resolve(), work, args.env_steps, max(1, (os.cpu_count() or 1) // args.jobs), tuple(args.overrides)
    )
    machine = describe_machine()
    _in_parallel(args.jobs, [lambda seed=seed: study.start(seed) for seed in args.seeds])
    # Seed by seed, so that what an interruption leaves behind compares all arms.
    wanted = [(arm, seed) for seed in args.seeds for arm in chosen]
    summaries = _in_parallel(args.jobs, [lambda arm=arm, seed=seed: study.train(arm, seed) for arm, seed in wanted])
    runs: dict[str, dict[str, Any]] = {arm: {} for arm in chosen}
    for (arm, seed), summary in zip(wanted, summaries, strict=True):
        runs[arm][str(seed)] = summary
    result = {
        "config": args.config.name,
        "overrides": args.overrides,
        "env_steps": args.env_steps,
        "machine": machine,
        "runs": runs,
    }
    write_json(result, args.out)
    if args.out is not None:
        draw(
            result,
            args.out.with_suffix(".png"),
            f"{args.config.stem}, {len(args.seeds)} seeds, commit {machine['commit']}",
        )
    print(markdown(result))


def run_name(arm: str, seed: int) -> str:
    """Return the folder of a run."""
    return f"{arm.replace('+', '-').replace(':', '-')}-{seed}"


def _in_parallel(jobs: int, work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results in order; the first failure ends the study after the runs that are under way."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(each) for each in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("--arms", nargs="+", default=["full"], help=f"{', '.join(arms.SETS)}, or names of arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--env-steps", type=int, default=20000, help="messages of the policy in training, for each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; the cores are shared out among them")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
