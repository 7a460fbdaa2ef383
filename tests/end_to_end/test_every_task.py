"""Every configuration of a task that ships trains from its own file: cold start, rollout, update, evaluation, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_fast.cli import main
from spear_fast.envs.registry import available
from spear_fast.log.records import METRICS_FILE, read_records

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(file for file in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("study/*.yaml")] if "-gpu" not in file.stem)
NO_FILE = {"prompts", "gymnasium", "openenv", "trl", "verifiers"}
"""Task sets of what a user brings."""
SMALL = (
    "steps=1", "cold_start.steps=2", "cold_start.num_demos=8", "cold_start.batch_size=4", "rollout.prompts_per_step=2",
    "rollout.group_size=2", "eval.num_tasks=2", "eval.every=0", "log.progress=off", "log.tensorboard=false",
)  # fmt: skip


def test_every_task_set_that_needs_no_data_has_a_file() -> None:
    named = {line.split()[1] for path in FILES for line in path.read_text().splitlines() if line.startswith("  name: ")}
    assert named == set(available()) - NO_FILE


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_it_trains(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["train", str(file), *SMALL, f"out={tmp_path}", "name=small"]) == 0
    records = read_records(tmp_path / "small" / METRICS_FILE)
    step = next(record for record in records if "reward/mean" in record)
    assert step["rollout/status_ok_frac"] + step["rollout/status_truncated_frac"] == 1.0
    assert step["rollout/turns_mean"] >= 1.0
    evaluations = [record for record in records if "eval/success_rate" in record]
    assert [record["eval/failed_frac"] for record in evaluations] == [0.0, 0.0]
