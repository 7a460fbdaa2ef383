"""Whole runs on a toy task: they improve, repeat, resume to the same numbers, and stop cleanly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.errors import CheckpointError, ConfigError, LogProbGapError
from spear_fast.log.progress import Progress
from spear_fast.trainer import Trainer
from tests.toys import GUESS_RUN

SPEAR = [
    "algo.preset=spear",
    "algo.replay.buffer_size=4",
    "algo.replay.warmup_steps=2",
    "algo.loss.kind=clip_cov",
]
ROOT = Path(__file__).parents[2]


def config_of(out: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"out={out}", *overrides], GUESS_RUN)


def run(config: RunConfig, resume: bool = False) -> tuple[list[dict], Path]:
    trainer = Trainer(config, Progress(config.steps, config.name), resume=resume)
    try:
        trainer.run()
    finally:
        trainer.close()
    return records(trainer.folder.path), trainer.folder.path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    volatile = ("time", "rollout/tokens_per_s", "sync/", "memory/")
    return [{key: value for key, value in line.items() if not key.startswith(volatile)} for line in lines]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoints/step_{step:06d}/model/model.safetensors")


def success(lines: list[dict]) -> list[float]:
    return [line["eval/success_rate"] for line in lines if "eval/success_rate" in line]


@pytest.mark.parametrize("algorithm", [["algo.preset=grpo"], SPEAR])
def test_training_improves_held_out_success(tmp_path, algorithm):
    lines, _ = run(config_of(tmp_path, "steps=20", *algorithm))
    before, after = success(lines)
    assert before < 0.4
    assert after > before + 0.4


@pytest.mark.parametrize("mode", ["separate_step", "joint"])
def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, mode):
    overrides = [*SPEAR, f"algo.replay.mode={mode}", "eval.every=2", "checkpoint.keep=9"]
    whole, whole_folder = run(config_of(tmp_path, "steps=6", "name=whole", *overrides))
    run(config_of(tmp_path, "steps=3", "name=parts", *overrides))
    parts, parts_folder = run(config_of(tmp_path, "steps=6", "name=parts", *overrides), resume=True)
    assert sum(line.get("replay/drawn", 0) for line in whole[-4:]) > 0, "the test must cover replay after the resume"
    # The shorter run ends at step 3 and evaluates there, which the unbroken one does not.
    parts = [line for line in parts if not ("eval/success_rate" in line and line["step"] == 3)]
    assert without_times(parts) == without_times(whole)
    one, two = weights(whole_folder, 6), weights(parts_folder, 6)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_metrics_behind_the_checkpoint_are_not_written_twice(tmp_path):
    overrides = ["checkpoint.every=2", "log.tensorboard=true"]
    _, folder = run(config_of(tmp_path, "steps=2", *overrides))
    # As a process leaves it that was killed in step 3, after writing the metrics and before the checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": 9.0}\n{"step": 4, "rewa')
    lines, _ = run(config_of(tmp_path, "steps=4", *overrides), resume=True)
    assert [line["step"] for line in lines if "reward/mean" in line] == [1, 2, 3, 4]
    assert all(line.get("reward/mean") != 9.0 for line in lines)


def test_a_killed_process_resumes_to_the_same_numbers(tmp_path):
    overrides = [*SPEAR, "checkpoint.every=1", "checkpoint.keep=3"]
    whole, _ = run(config_of(tmp_path, "steps=6", "name=whole", *overrides))
    process = start_cli(tmp_path, "steps=500", "name=parts", *overrides)
    wait_for(tmp_path / "parts/checkpoints/step_000002", process)
    process.kill()
    process.wait()
    done = max(line["step"] for line in records_so_far(tmp_path / "parts"))
    parts, _ = run(config_of(tmp_path, f"steps={max(6, done + 1)}", "name=parts", *overrides), resume=True)
    steps = [line for line in without_times(parts) if "reward/mean" in line and line["step"] <= 6]
    assert steps == [line for line in without_times(whole) if "reward/mean" in line]


def test_sigterm_saves_and_says_how_to_continue(tmp_path):
    process = start_cli(tmp_path, "steps=5000", "name=stopped", "checkpoint.every=0")
    wait_for(tmp_path / "stopped/metrics.jsonl", process, lines=3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume" in output
    newest = (tmp_path / "stopped/checkpoints/latest").read_text().strip()
    assert int(newest.removeprefix("step_")) == records(tmp_path / "stopped")[-1]["step"]


def start_cli(out: Path, *overrides: str) -> subprocess.Popen:
    import yaml

    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(GUESS_RUN))
    command = [sys.executable, "-m", "spear_fast.cli", "train", str(config), f"out={out}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def wait_for(path: Path, process: subprocess.Popen, lines: int = 0) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or (lines and len(path.read_text().splitlines()) < lines):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{path} did not appear: {process.communicate()[0]}")
        time.sleep(0.02)


def records_so_far(folder: Path) -> list[dict]:
    whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def test_a_second_run_of_the_same_name_loses_nothing(tmp_path):
    run(config_of(tmp_path, "steps=1"))
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with --resume"):
        Trainer(config_of(tmp_path, "steps=1"), Progress(1, "guess"))


def test_a_run_resumed_from_step_zero_evaluates_its_start_once(tmp_path):
    run(config_of(tmp_path, "steps=0"))
    lines, _ = run(config_of(tmp_path, "steps=1"), resume=True)
    assert [line["step"] for line in lines if "eval/success_rate" in line] == [0, 1]


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(tmp_path):
    (tmp_path / "guess/checkpoints/.saving-step_000000").mkdir(parents=True)
    lines, _ = run(config_of(tmp_path, "steps=1"))
    assert lines[-1]["step"] == 1


def test_steps_that_are_not_finite_are_skipped_dumped_and_not_replayed(tmp_path, monkeypatch):
    from spear_fast.update.optimizer import Optimizer

    monkeypatch.setattr(Optimizer, "clip_gradients", lambda self: torch.tensor(float("nan")))
    unfiltered = [f"algo.filters.{name}=false" for name in ("overlong", "incomplete", "unreadable")]
    config = config_of(tmp_path, "steps=2", "cold_start.steps=1", *SPEAR, *unfiltered)
    lines, folder = run(config)
    steps = [line for line in lines if "reward/mean" in line]
    assert [line["update/skipped_steps"] for line in steps] == [1.0, 1.0]
    assert all(line["replay/admitted"] == 0 for line in steps)
    assert list((folder / "nonfinite").glob("*.npz"))


def test_resume_refuses_what_would_change_the_computation(tmp_path):
    run(config_of(tmp_path, "steps=1"))
    with pytest.raises(CheckpointError, match=r"update\.lr differ"):
        Trainer(config_of(tmp_path, "steps=2", "update.lr=0.5"), Progress(1, "guess"), resume=True)
    with pytest.raises(CheckpointError, match="holds no run"):
        Trainer(config_of(tmp_path, "name=other"), Progress(1, "other"), resume=True)


def test_resume_may_change_where_and_how_the_same_is_computed(tmp_path):
    whole, _ = run(config_of(tmp_path, "steps=2", "name=whole"))
    run(config_of(tmp_path, "steps=1", "name=parts"))
    elsewhere = ["memory.mode=offload", "engine.verify_weights=first", "parallel.timeout_s=60", "model.attention=sdpa"]
    parts, _ = run(config_of(tmp_path, "steps=2", "name=parts", *elsewhere), resume=True)
    assert without_times(parts)[-2:] == without_times(whole)[-2:]


def test_stale_engine_weights_stop_the_run(tmp_path, monkeypatch):
    from spear_fast.rollout.hf_engine import HFEngine

    def pretend(self, named, version):
        for _ in named:
            pass
        self.weights_version = version

    monkeypatch.setattr(HFEngine, "load_weights", pretend)
    with pytest.raises(LogProbGapError, match=r"update\.max_logp_gap"):
        run(config_of(tmp_path, "steps=20", "update.lr=0.02", "engine.verify_weights=never"))


def test_reference_kl_is_zero_at_first_and_holds_the_policy_back(tmp_path):
    free, _ = run(config_of(tmp_path, "steps=12", "name=free", "algo.loss.kl_coef=0.000001"))
    held, _ = run(config_of(tmp_path, "steps=12", "name=held", "algo.loss.kl_coef=3.0"))
    name = "update/kl_ref_nats"
    free_kl, held_kl = ([line[name] for line in lines if name in line] for lines in (free, held))
    assert abs(free_kl[0]) < 1e-5
    assert held_kl[-1] < 0.5 * free_kl[-1]


def test_recomputed_old_logps_agree_with_the_samplers(tmp_path):
    lines, _ = run(config_of(tmp_path, "steps=2", "update.old_logp=recompute", "update.tis_clip=2.0"))
    gaps = [line["update/logp_gap_nats"] for line in lines if "update/logp_gap_nats" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_a_saved_policy_is_a_usable_hugging_face_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = run(config_of(tmp_path, "steps=1"))
    path = folder / "checkpoints/step_000001/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "digit?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sampled = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(sampled[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.isdigit()


def test_samples_are_written_for_reading(tmp_path):
    _, folder = run(config_of(tmp_path, "steps=2"))
    assert "digit?" in (folder / "samples/step_000002.md").read_text()
    assert "digit?" in (folder / "eval/samples/step_000000.md").read_text()
