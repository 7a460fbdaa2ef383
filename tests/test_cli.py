"""The command line as a user meets it: exit codes, messages, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from spear_fast.cli import main
from tests.toys import GUESS_RUN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run.yaml").write_text(yaml.safe_dump(GUESS_RUN))
    assert main(["train", str(folder / "run.yaml"), f"out={folder}", "steps=2"]) == 0
    return folder / "guess"


def test_train_reports_and_leaves_a_complete_run_folder(finished_run):
    present = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "start_model", "curves.png"} <= present


def test_train_twice_is_refused_with_the_remedy(finished_run, capsys):
    command = ["train", str(finished_run.parent / "run.yaml"), f"out={finished_run.parent}", "steps=2"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_continues(finished_run, capsys):
    command = ["train", str(finished_run.parent / "run.yaml"), f"out={finished_run.parent}", "steps=3", "--resume"]
    assert main(command) == 0
    assert "held-out success after step 3" in capsys.readouterr().out


def test_overrides_may_follow_options(finished_run, capsys):
    assert main(["train", str(finished_run.parent / "run.yaml"), "--dry-run", "seed=31"]) == 0
    assert "seed: 31" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", str(finished_run.parent / "run.yaml"), "--dry-run", "--sead=31"])


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr("spear_fast.cli.train", absent)
    assert main(["train", str(ROOT / "configs/quickstart.yaml")]) == 2
    assert "pip install 'spear-fast[train]'" in capsys.readouterr().err


def test_eval_of_a_run_and_of_its_model_agree(finished_run, capsys):
    task = "tests.toys:GuessTasks"
    assert main(["eval", str(finished_run), task]) == 0
    of_run = capsys.readouterr().out
    model = max((finished_run / "checkpoints").glob("step_*")) / "model"
    settings = ["eval.num_tasks=64", "rollout.max_tokens=40", "rollout.max_turn_tokens=4"]
    assert main(["eval", str(model), task, *settings]) == 0
    of_model = capsys.readouterr().out
    assert "95 % interval" in of_run
    assert of_run.split("success", 1)[1].splitlines()[0] == of_model.split("success", 1)[1].splitlines()[0]


def test_eval_of_a_run_on_another_task(tmp_path, capsys):
    small = [
        "steps=0",
        f"out={tmp_path}",
        "name=one",
        "cold_start.steps=2",
        "cold_start.num_demos=32",
        "eval.num_tasks=2",
    ]
    assert main(["train", str(ROOT / "configs/quickstart.yaml"), *small]) == 0
    assert main(["eval", str(tmp_path / "one"), "treasure", "task.params.num_rooms=3"]) == 0
    assert "on treasure: success" in capsys.readouterr().out


def test_eval_of_nothing_is_refused(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "calculator"]) == 2
    assert "neither a run's folder" in capsys.readouterr().err


def test_plot_draws_several_runs(finished_run, tmp_path, capsys):
    assert main(["plot", str(finished_run), str(finished_run), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("algo.replay.enable=true", "algo.replay.enabled"),
        ("update.lr=fast", "update.lr"),
        ("task.params.max_termz=3", "task.params.max_terms"),
        ("task.name=calculater", "calculator"),
        ("algo.preset=speer", "algo.preset"),
        ("rollout.max_tokens=99999", "update.token_budget"),
    ],
)
def test_wrong_settings_end_before_any_work_with_the_key_named(override, needle, tmp_path, capsys):
    assert main(["train", str(ROOT / "configs/quickstart.yaml"), f"out={tmp_path}", override]) == 2
    assert needle in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_has_a_plan(config, capsys):
    assert main(["train", str(config), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Plan of run" in printed and "steps:" in printed


@pytest.mark.parametrize("task", ["calculator", "treasure"])
@pytest.mark.parametrize("preset", ["grpo", "drbot", "gigpo", "spear", "spear_gigpo"])
def test_every_preset_runs_on_every_environment(task, preset, tmp_path):
    small = [
        f"out={tmp_path}",
        "name=small",
        "steps=2",
        f"algo.preset={preset}",
        "cold_start.steps=12",
        "cold_start.num_demos=64",
        "cold_start.batch_size=16",
        "rollout.prompts_per_step=2",
        "rollout.group_size=4",
        "algo.replay.buffer_size=1",
        "eval.num_tasks=2",
        "log.progress=off",
        "log.tensorboard=false",
        "model.init.hidden_size=32",
        "model.init.num_layers=2",
        "model.init.intermediate_size=64",
    ]
    name = {"calculator": "quickstart", "treasure": "treasure"}[task]
    assert main(["train", str(ROOT / f"configs/{name}.yaml"), *small]) == 0
    lines = [json.loads(line) for line in (tmp_path / "small/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert len(steps) == 2
    assert all("replay/size" in line for line in steps) == preset.startswith("spear")
    gigpo = "gigpo" in preset
    assert all(("advantage/anchor_group_size_mean" in line) == gigpo for line in steps)
