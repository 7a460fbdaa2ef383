"""Whole runs on several ranks, as torchrun starts them: the same run as one process makes, resumable on any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from spear_fast.assemble import make_tasks
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.data.prompts import PromptStream
from spear_fast.log.progress import Progress
from spear_fast.trainer import Trainer
from tests.toys import GUESS_RUN

ROOT = Path(__file__).parents[2]
SPEAR = ["algo.preset=spear", "algo.replay.buffer_size=4", "algo.replay.warmup_steps=2", "update.token_budget=400"]
EXACT = ("rollout/trajectories", "replay/drawn", "replay/size", "update/optimizer_steps", "filter/groups_kept_frac")
CLOSE = ("reward/mean", "reward/success_rate", "update/loss", "update/grad_norm", "update/entropy_nats", "sil/loss")


def config_file(out: Path) -> Path:
    path = out / "guess.yaml"
    path.write_text(yaml.safe_dump(GUESS_RUN))
    return path


def start(out: Path, ranks: int, *overrides: str, resume: bool = False) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "spear_fast.cli",
        "train",
        str(config_file(out)),
        f"out={out}",
        *SPEAR,
        *overrides,
    ]
    # What a launcher above this test has set would make the run a part of another job.
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    return subprocess.Popen(
        [*command, "log.progress=plain", *(["--resume"] if resume else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def config_of(out: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"out={out}", *SPEAR, *overrides], GUESS_RUN)


def run_here(out: Path, *overrides: str, resume: bool = False) -> list[dict]:
    """The run of one rank, in this process."""
    config = config_of(out, *overrides)
    trainer = Trainer(config, Progress(config.steps, config.name), resume=resume)
    try:
        trainer.run()
    finally:
        trainer.close()
    return training_lines(trainer.folder.path)


def run(out: Path, ranks: int, *overrides: str, resume: bool = False) -> list[dict]:
    process = start(out, ranks, *overrides, resume=resume)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    name = next(override.removeprefix("name=") for override in overrides if override.startswith("name="))
    return training_lines(out / name)


def training_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def assert_same_run(actual: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for one, other in zip(actual, expected, strict=True):
        for name in EXACT:
            assert one.get(name) == other.get(name), (one["step"], name)
        for name in CLOSE:
            assert (name in one) == (name in other), (one["step"], name)
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=2e-3, abs=2e-5), (one["step"], name)


def test_two_ranks_make_the_run_of_one_and_one_continues_it(tmp_path):
    alone = run_here(tmp_path, "name=alone", "steps=5")
    assert sum(line.get("replay/drawn", 0) for line in alone[-2:]) > 0, "the test must cover replay after the resume"
    two = run(tmp_path, 2, "name=two", "steps=3")
    assert_same_run(two, alone[:3])
    continued = run_here(tmp_path, "name=two", "steps=5", resume=True)
    assert_same_run(continued, alone)


def test_four_ranks_train_hybrid_shards_in_bfloat16_and_one_continues(tmp_path):
    extra = ["name=four", "model.dtype=bfloat16", "update.max_logp_gap=1.0", "cold_start.steps=5"]
    run(tmp_path, 4, *extra, "steps=2", "parallel.replicate=2")
    # The mesh may change, and so may what a step needs of memory.
    lines = run_here(tmp_path, *extra, "steps=3", "memory.mode=offload", resume=True)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["update/skipped_steps"] == 0 for line in lines)


def test_sigterm_stops_all_ranks_after_the_same_step_and_no_prompt_is_lost(tmp_path, monkeypatch):
    """With partial rollouts and a rank that has no share of a step's groups, resumed on another number of ranks."""
    partial = ["rollout.mode=partial", "rollout.deterministic=false", "rollout.oversample=2"]
    extra = ["name=stopped", "cold_start.steps=5", "rollout.prompts_per_step=1", "eval.num_tasks=1", *partial]
    process = start(tmp_path, 2, *extra, "steps=5000", "checkpoint.every=0")
    metrics = tmp_path / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    newest = (tmp_path / "stopped/checkpoints/latest").read_text().strip()
    done = int(newest.removeprefix("step_"))
    assert done == training_lines(tmp_path / "stopped")[-1]["step"], output
    state = json.loads((tmp_path / "stopped/checkpoints" / newest / "trainer.json").read_text())
    assert state["prompts"]["consumed"] == state["started_groups"] == done + 1
    left = [task["index"] for task in state["unfinished"]]
    trained: list[int] = []
    monkeypatch.setattr(
        Trainer, "_write_samples", lambda self, groups, folder: trained.extend(group.task.index for group in groups)
    )
    run_here(tmp_path, *extra, f"steps={done + 2}", "log.sample_every=1", "eval.every=0", resume=True)
    prompts = PromptStream(make_tasks(config_of(tmp_path)), 0)
    assert left[0] in trained[:2] and left[0] in [task.index for task in prompts.next(done + 1)[-3:]]
