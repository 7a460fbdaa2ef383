"""Supervised runs: they learn, resume to the same numbers, and their model is what training and evaluation take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spear_fast.cli import main
from spear_fast.config.load import load_config
from spear_fast.errors import CheckpointError, ConfigError
from spear_fast.log.progress import Progress
from spear_fast.sft import Sft, split_demos
from tests.toys import GUESS_RUN

ROOT = Path(__file__).parents[1]
RUN: dict[str, Any] = {
    **GUESS_RUN,
    "name": "sft",
    "steps": 0,
    "task": {"name": "treasure", "params": {"num_rooms": 3, "max_steps": 8, "num_eval": 4, "num_demo": 64}},
    "model": {"init": {**GUESS_RUN["model"]["init"], "max_positions": 512}},
    "cold_start": {"steps": 8, "num_demos": 40, "batch_size": 8, "lr": 1e-2, "warmup_steps": 2, "eval_fraction": 0.2},
    "rollout": {**GUESS_RUN["rollout"], "max_turns": 8, "max_turn_tokens": 24, "max_tokens": 512},
    "eval": {"num_tasks": 2, "every": 2},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds run.yaml and the finished run sft."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    assert command(folder, "sft") == 0
    return folder


def command(folder: Path, name: str, *arguments: str) -> int:
    return main([name, str(folder / "run.yaml"), f"out={folder}", *arguments])


def records(run: Path) -> list[dict[str, float]]:
    """What was logged, without what depends on time."""
    volatile = ("time", "memory/", "sft/tokens_per_s")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(volatile)} for line in lines]


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped_after(folder: Path, steps: int, *overrides: str) -> None:
    """Leave a run as SIGTERM does that comes in this step."""
    config = load_config(None, [f"out={folder}", *overrides], RUN)

    class Stop(Progress):
        def step(self, step: int, metrics: Any) -> None:
            run.stop_requested |= step == steps

    run = Sft(config, Stop(steps, "sft"))
    run.run()
    run.close()
    assert run.stop_requested and not run.model_folder.exists()


def test_training_and_held_out_loss_fall(folder):
    lines = records(folder / "sft")
    losses = [line["sft/loss_nats"] for line in lines if "sft/loss_nats" in line]
    held_out = {line["step"]: line["sft/eval_loss_nats"] for line in lines if "sft/eval_loss_nats" in line}
    assert len(losses) == 8 and losses[-1] < losses[0] - 1.0
    assert list(held_out) == [0, 2, 4, 6, 8] and held_out[8] < held_out[0] - 1.0
    steps = [line for line in lines if "sft/loss_nats" in line]
    assert steps[0]["update/lr"] == pytest.approx(5e-3) and steps[1]["update/lr"] == pytest.approx(1e-2)
    assert [line["eval/num_tasks"] for line in lines if "eval/success_rate" in line] == [2.0]


def test_two_ranks_learn_what_one_does(folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    options = [f"out={folder}", "name=ranks", "cold_start.eval_success=false"]
    # What a launcher above this test has set would make the run a part of another job.
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*launcher, "spear_fast.cli", "sft", str(folder / "run.yaml"), *options],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (
        [line[key] for line in records(folder / name) for key in ("sft/loss_nats", "sft/eval_loss_nats") if key in line]
        for name in ("sft", "ranks")
    )
    assert len(one) == 13 and two == pytest.approx(one, rel=1e-3)
    assert (
        load_file(folder / "ranks/model/model.safetensors").keys()
        == load_file(folder / "sft/model/model.safetensors").keys()
    )


def test_the_end_is_reported(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    assert command(tmp_path, "sft", "cold_start.steps=1", "cold_start.eval_success=false") == 0
    printed = capsys.readouterr().out
    assert "held-out loss: " in printed and "at step 0, " in printed and f"model: {tmp_path}/sft/model" in printed
    assert f"curves: {tmp_path}/sft/curves.png" in printed and (tmp_path / "sft/curves.png").exists()
    assert "held-out success" not in printed


@pytest.mark.parametrize("kind", ["built", "adapters"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(folder, kind):
    overrides = ["cold_start.eval_success=false", "cold_start.steps=6"]
    if kind == "adapters":
        overrides += [f"model.path={folder / 'sft/model'}", "model.lora.rank=2"]
    whole, parts = f"{kind}-whole", f"{kind}-parts"
    assert command(folder, "sft", *overrides, f"name={whole}") == 0
    stopped_after(folder, 3, *overrides, f"name={parts}")
    assert command(folder, "sft", *overrides, f"name={parts}", "--resume") == 0
    assert records(folder / parts) == records(folder / whole)
    assert same_weights(folder / parts / "model", folder / whole / "model")
    assert not same_weights(folder / parts / "model", folder / "sft/model")


def test_other_demonstrations_cannot_be_resumed_with(folder, tmp_path):
    demos = tmp_path / "demos.jsonl"
    write(demos, 12)
    overrides = [f"cold_start.demos_file={demos}", "name=moved"]
    stopped_after(folder, 1, *overrides)
    write(demos, 11)
    with pytest.raises(CheckpointError, match="the demonstrations are not those"):
        Sft(load_config(None, [f"out={folder}", *overrides], RUN), Progress(1, "sft"), resume=True)


def write(path: Path, count: int) -> None:
    params = ["num_rooms=3", "max_steps=8", "num_eval=4", "num_demo=64"]
    assert main(["tasks", "treasure", "--demos", str(count), "--out", str(path), *params]) == 0


def test_the_cold_start_of_training_is_the_same_with_experts_a_file_or_sft(folder, tmp_path):
    write(tmp_path / "demos.jsonl", 40)
    few = ["cold_start.steps=2", "cold_start.eval_fraction=0", "eval.num_tasks=1"]
    assert command(folder, "train", *few, "name=experts") == 0
    assert command(folder, "train", *few, f"cold_start.demos_file={tmp_path / 'demos.jsonl'}", "name=file") == 0
    assert command(folder, "sft", *few, "name=alone", "cold_start.eval_success=false") == 0
    start = folder / "experts/start_model"
    assert same_weights(folder / "file/start_model", start)
    assert same_weights(folder / "alone/model", start)


def test_training_and_evaluation_take_the_model(folder, capsys):
    model = folder / "sft/model"
    assert command(folder, "train", f"model.path={model}", "cold_start.steps=0", "name=trained") == 0
    assert same_weights(folder / "trained/checkpoints/step_000000/model", model)
    assert main(["eval", str(folder / "sft"), "treasure"]) == 0
    of_run = capsys.readouterr().out.rsplit("on treasure: ", 1)[1]
    assert f"eval/success_rate {records(folder / 'sft')[-1]['eval/success_rate']:.4g}" in of_run


def test_a_file_of_its_own_can_be_held_out(tmp_path):
    write(tmp_path / "held_out.jsonl", 3)
    config = load_config(None, [f"out={tmp_path}", f"cold_start.eval_file={tmp_path / 'held_out.jsonl'}"], RUN)
    run = Sft(config, Progress(1, "sft"))
    try:
        assert run.num_demos == 40 and len(run._held_out) == 3
    finally:
        run.close()


def test_the_split_is_of_distinct_demonstrations_and_stable():
    demos = [[{"role": "user", "content": str(number % 50)}] for number in range(100)]
    learned, held_out = split_demos(demos, 0.2)
    assert len(held_out) == 20 and len(learned) == 80
    assert not [demo for demo in held_out if demo in learned]
    assert all(demo in split_demos(demos, 0.4)[1] for demo in held_out)
    assert split_demos(demos, 0.0) == (demos, [])
    assert [len(part) for part in split_demos(demos[:2], 0.99)] == [1, 1]
    with pytest.raises(ConfigError, match=r"cold_start\.eval_fraction=0\.1"):
        split_demos(demos[:1] * 9, 0.1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cold_start.steps=0", "model.path=nowhere"], "cold_start.steps=0"),
        (["cold_start.demos_file=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["rollout.max_tokens=60"], "rollout.max_tokens=60 is too small for demonstration"),
        (["cold_start.eval_fraction=1.0"], "cold_start.eval_fraction"),
    ],
)
def test_wrong_settings_are_named(folder, overrides, said, capsys):
    assert command(folder, "sft", "name=wrong", *overrides) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_another_kind_is_not_resumed(folder, capsys):
    assert command(folder, "train", "--resume") == 2
    assert "has no part 'trainer.json'" in capsys.readouterr().err
    assert command(folder, "sft") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_the_plan_of_a_dry_run(folder, capsys):
    assert command(folder, "sft", "--dry-run", "cold_start.demos_file=d.jsonl", "name=dry") == 0
    printed = capsys.readouterr().out
    assert "Plan of supervised run dry" in printed and "8 steps of 8 out of those in d.jsonl" in printed
    assert not (folder / "dry").exists()
