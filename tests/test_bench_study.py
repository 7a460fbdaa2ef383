"""The study: what its arms change, what it reads off a run, its intervals, and a small one from start to tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import study
from bench.studies import arms, records
from bench.studies import run as one_run
from bench.studies.intervals import paired_difference
from bench.studies.tables import markdown, title
from spear_fast.config.load import load_config
from spear_fast.config.presets import PRESETS
from spear_fast.log.records import METRICS_FILE, read_records

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "task.params.num_eval=8", "task.params.max_steps=6",
    "model.init.hidden_size=32", "model.init.num_layers=1", "model.init.num_heads=2", "model.init.num_kv_heads=1",
    "model.init.intermediate_size=64", "model.init.max_positions=512", "cold_start.steps=2", "cold_start.num_demos=16",
    "cold_start.batch_size=4", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_turns=6",
    "rollout.max_turn_tokens=8", "rollout.max_tokens=400", "eval.num_tasks=4", "eval.every=1",
    "algo.replay.warmup_steps=1", "log.sample_every=0",
)  # fmt: skip


def config(arm: str) -> Any:
    return load_config(ROOT / "configs/treasure.yaml", arms.overrides(arm)).algo


def test_arms_are_the_named_algorithms_and_spear_less_one_part() -> None:
    assert arms.SETS["full"] == [arm for name in arms.BASELINES for arm in (name, f"{name}+spear")]
    full = config("drbot-gigpo+spear")
    assert full.advantage.estimator == "gigpo" and full.loss.kind == "clip_cov" and full.replay.enabled
    assert full.filters.keep_groups == PRESETS["drbot"]["filters"]["keep_groups"]
    spear, drbot = config("drbot+spear").model_dump(), config("drbot").model_dump()
    assert {name for name in spear if spear[name] != drbot[name]} == {"intrinsic", "loss", "replay"}
    changed = {
        "no-sil": ("replay", "enabled"), "no-intrinsic": ("intrinsic", "mode"),
        "no-recalibration": ("replay", "recalibrate"), "no-clip-cov": ("loss", "kind"),
    }  # fmt: skip
    assert changed.keys() == arms.ABLATIONS.keys()
    for name, (section, key) in changed.items():
        without = config(f"drbot-gigpo+spear:{name}").model_dump()
        expected = full.model_dump()
        assert without[section][key] != expected[section][key]
        expected[section][key] = without[section][key]
        assert without == expected


@pytest.mark.parametrize("arm", ["ppo", "grpo+sil", "grpo+spear:no-luck", "grpo:no-sil", "", "+spear"])
def test_an_unknown_arm_is_refused_with_the_known_ones(arm: str) -> None:
    with pytest.raises(SystemExit, match=r"drbot-gigpo.*:no-clip-cov"):
        arms.overrides(arm)


def test_summary_counts_messages_and_places_evaluations_behind_their_step() -> None:
    def step(number: int, turns: float) -> dict[str, Any]:
        return {"step": number, "rollout/turns_mean": turns, "rollout/trajectories": 8.0,
                "reward/success_rate": 0.5, "replay/drawn": 3.0}  # fmt: skip

    def evaluation(number: int, success: float) -> dict[str, Any]:
        return {"step": number, "eval/success_rate": success, "eval/num_tasks": 16.0, "eval/turns_mean": 2.0}

    seen = records.summarise([evaluation(0, 0.25), step(1, 2.5), step(2, 4.0), evaluation(2, 0.75)])
    assert [(point["env_steps"], point["success"]) for point in seen["evaluations"]] == [(0, 0.25), (52, 0.75)]
    assert [point["env_steps"] for point in seen["curves"]] == [20, 52]
    assert (seen["before"], seen["after"], seen["replayed"], seen["training_steps"]) == (0.25, 0.75, 6, 2)


def test_difference_over_seeds_has_the_interval_of_students_t() -> None:
    centre, interval = paired_difference([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert centre == pytest.approx(0.2) and interval is not None
    # Three differences 0.1, 0.2, 0.3: standard error 0.1 / sqrt(3), quantile 4.303.
    assert interval == pytest.approx((0.2 - 0.24843, 0.2 + 0.24843), abs=1e-4)
    assert paired_difference([0.5], [0.25]) == (-0.25, None)
    with pytest.raises(ValueError, match="11 seeds"):
        paired_difference([0.0] * 11, [1.0] * 11)


def test_tables_compare_runs_of_equal_seeds() -> None:
    def run(after: float) -> dict[str, Any]:
        return {"before": 0.2, "after": after, "num_tasks": 10, "training_steps": 5, "replayed": 7,
                "evaluations": [{"turns": 3.0}]}  # fmt: skip

    rates = {"drbot-gigpo": (0.3, 0.5), "drbot-gigpo+spear": (0.6, 0.7), "drbot-gigpo+spear:no-sil": (0.5, 0.6)}
    runs = {arm: {"0": run(first), "4": run(second)} for arm, (first, second) in rates.items()}
    text = markdown({"runs": runs, "env_steps": 100})
    assert "| Dr.BoT (GiGPO) | 40.0 % [" in text and "seeds 0, 4" in text and "20.0 / 20.0 %" in text
    assert "| Dr.BoT (GiGPO) | +25.0 | [-38.5, +88.5] |" in text
    assert "| without self-imitation | 55.0 % [" in text and "| -10.0 | [-10.0, -10.0] |" in text
    assert title("grpo+spear:no-clip-cov") == "GRPO + SPEAR without Clip-Cov"


def test_a_small_study_runs_goes_on_and_draws(tmp_path: Path) -> None:
    file, work = tmp_path / "study.json", tmp_path / "work"
    settings = [*TINY, "steps=9", "rollout.deterministic=true"]
    (tmp_path / "tiny.yaml").write_text("name: tiny\nsteps: 9\ntask:\n  name: treasure\n")
    command = [str(tmp_path / "tiny.yaml"), *settings, "--seeds", "5", "--env-steps", "20", "--work", str(work)]
    study.main([*command, "--arms", "gigpo+spear", "--out", str(file)])
    result = json.loads(file.read_text())
    summary = result["runs"]["gigpo+spear"]["5"]
    assert 20 <= summary["env_steps"] < 20 + 24 and summary["training_steps"] < 9
    assert summary["evaluations"][-1]["env_steps"] == summary["env_steps"]
    assert file.with_suffix(".png").stat().st_size > 10_000

    with pytest.raises(SystemExit, match="other settings"):
        study.main([command[0], "update.lr=0.1", *command[1:], "--arms", "gigpo+spear"])

    folder = work / "gigpo-spear-5"
    records_before = read_records(folder / METRICS_FILE)
    finished = [record["step"] for record in records_before if records.env_steps(record)][-1]
    options = [*settings, "seed=5", f"model.path={work}/start-5/start_model", *arms.overrides("gigpo+spear")]
    options = [option for option in options if not option.startswith("cold_start.steps=")] + ["cold_start.steps=0"]
    more = [*options, "name=gigpo-spear-5", f"out={work}", "log.tensorboard=false"]
    one_run.main([str(tmp_path / "tiny.yaml"), "--env-steps", str(summary["env_steps"] + 1), *more])
    after = read_records(folder / METRICS_FILE)
    steps = [record["step"] for record in after if records.env_steps(record)]
    assert steps == list(range(1, finished + 2))
