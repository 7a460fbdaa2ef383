"""The quickstart with the real vLLM: tools are called, the engine's weights are the trainer's, log-probs agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["steps=3", "rollout.prompts_per_step=8", "eval.num_tasks=16", "checkpoint.every=0"]
COLD_START = ["cold_start.steps=40", "cold_start.num_demos=512", "cold_start.batch_size=16"]
"""The whole quickstart takes minutes; this much learns the format and passes through every phase."""


def run(out: Path, *overrides: str) -> Path:
    """The folder of a run that the command line made in a process of its own."""
    command = [sys.executable, "-m", "spear_fast.cli", "train", str(ROOT / "configs/quickstart.yaml"), "engine=vllm"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [*command, f"out={out}", "log.progress=plain", *SHORT, *overrides],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "quickstart"


def steps_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def assert_learnt_with_its_own_weights(folder: Path) -> None:
    steps = steps_of(folder)
    assert [line["sync/version"] for line in steps] == [1, 2, 3]
    assert all(line["sync/unverified"] == 0 for line in steps), "every parameter must be compared with the engine's"
    assert all(line["update/logp_gap_nats"] < 0.02 for line in steps)
    assert sum(line["reward/tool_calls_mean"] for line in steps) > 0
    assert all(line["rollout/status_ok_frac"] + line["rollout/status_truncated_frac"] == 1 for line in steps)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("inproc"), *COLD_START)


def test_the_quickstart_runs_with_vllm(quickstart):
    assert_learnt_with_its_own_weights(quickstart)


def test_its_policy_trains_on_in_bfloat16_with_vllm_in_a_process_of_its_own(quickstart, tmp_path):
    start = [f"model.path={quickstart / 'start_model'}", "cold_start.steps=0"]
    assert_learnt_with_its_own_weights(run(tmp_path, *start, "engine.placement=process", "model.dtype=bfloat16"))


def test_windowed_rows_are_what_vllm_was_fed(quickstart, tmp_path):
    start = [f"model.path={quickstart / 'start_model'}", "cold_start.steps=0"]
    folder = run(tmp_path, *start, "rollout.history=windowed", "rollout.window=1", "steps=3")
    assert_learnt_with_its_own_weights(folder)
    assert all(line["rollout/rows_mean"] == line["rollout/turns_mean"] > 1 for line in steps_of(folder))
