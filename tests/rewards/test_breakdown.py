"""Success by task type: rates of each type, under names that every sink takes."""

from __future__ import annotations

from spear_fast.rewards import score
from spear_fast.rewards.breakdown import success_by_type
from spear_fast.types import Group, Status, Task, Trajectory

TASK = Task("house", "train", 0, seed=0)


def trajectory(task_type: str | None, success: bool, status: Status = Status.OK) -> Trajectory:
    return Trajectory(TASK, 0, 0, 0, 0, task_type=task_type, success=success, status=status)


def test_rates_of_each_type() -> None:
    made = [trajectory(*of) for of in (("look", True), ("heat/then place", False), ("look", False), (None, True))]
    assert success_by_type(made, "eval/success") == {"eval/success/heat_then_place": 0.0, "eval/success/look": 0.5}
    assert success_by_type([trajectory(None, True)], "eval/success") == {}


def test_training_metrics_hold_them_for_usable_trajectories() -> None:
    made = [trajectory("look", True), trajectory("look", False, Status.ENV_ERROR)]
    stats = score([Group(0, TASK, made)], mu=0.0, variant="graded", count="turns", per_call=0.1)
    assert stats["reward/success/look"] == 1.0
