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

from tests.toys import GUESS_RUN

ROOT = Path(__file__).parents[2]
SPEAR = ["algo.preset=spear", "algo.replay.buffer_size=4", "algo.replay.warmup_steps=2", "update.token_budget=400"]
EXACT = ("rollout/trajectories", "replay/drawn", "replay/size", "update/optimizer_steps", "filter/groups_kept_frac")
CLOSE = ("reward/mean", "reward/success_rate", "update/loss", "update/grad_norm", "update/entropy_nats", "sil/loss")


def start(out: Path, ranks: int, *overrides: str, resume: bool = False) -> subprocess.Popen:
    config = out / "guess.yaml"
    config.write_text(yaml.safe_dump(GUESS_RUN))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        "-m",
        "spear_fast.cli",
        "train",
        str(config),
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
    alone = run(tmp_path, 1, "name=alone", "steps=5")
    assert sum(line.get("replay/drawn", 0) for line in alone[-2:]) > 0, "the test must cover replay after the resume"
    two = run(tmp_path, 2, "name=two", "steps=3")
    assert_same_run(two, alone[:3])
    continued = run(tmp_path, 1, "name=two", "steps=5", resume=True)
    assert_same_run(continued, alone)


def test_hybrid_shards_in_bfloat16_train_and_four_ranks_save_and_resume(tmp_path):
    extra = ["name=four", "parallel.replicate=2", "model.dtype=bfloat16", "update.max_logp_gap=1.0"]
    run(tmp_path, 4, *extra, "steps=2")
    lines = run(tmp_path, 4, *extra, "steps=3", resume=True)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["update/skipped_steps"] == 0 for line in lines)


def test_sigterm_stops_all_ranks_after_the_same_step(tmp_path):
    process = start(tmp_path, 2, "name=stopped", "steps=5000", "checkpoint.every=0")
    metrics = tmp_path / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    newest = (tmp_path / "stopped/checkpoints/latest").read_text().strip()
    assert int(newest.removeprefix("step_")) == training_lines(tmp_path / "stopped")[-1]["step"], output
