"""What a study reads off a run's metrics: environment steps, evaluations, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CURVES = {
    "success": "reward/success_rate",
    "entropy": "update/entropy_nats",
    "turns": "rollout/turns_mean",
    "tool_calls": "reward/tool_calls_mean",
    "replay": "replay/size",
}
"""Curves by name: the metric of a training step behind each."""


def env_steps(record: Mapping[str, Any]) -> int:
    """Return the environment steps, messages of the policy, of a training step; 0 for other records."""
    if "reward/success_rate" not in record:
        return 0
    return round(record["rollout/turns_mean"] * record["rollout/trajectories"])


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return evaluations and curves over the environment steps used up by then.

    A record of an evaluation follows that of its step.
    """
    used = 0
    evaluations: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for record in records:
        used += env_steps(record)
        if "eval/success_rate" in record:
            evaluations.append(
                {
                    "step": record["step"],
                    "env_steps": used,
                    "success": record["eval/success_rate"],
                    "num_tasks": int(record["eval/num_tasks"]),
                    "turns": record["eval/turns_mean"],
                }
            )
        if env_steps(record):
            point = {name: record[metric] for name, metric in CURVES.items() if metric in record}
            curves.append({"step": record["step"], "env_steps": used, **point})
    return {
        "env_steps": used,
        "before": evaluations[0]["success"],
        "after": evaluations[-1]["success"],
        "num_tasks": evaluations[-1]["num_tasks"],
        "training_steps": len(curves),
        "replayed": int(sum(record.get("replay/drawn", 0) for record in records)),
        "evaluations": evaluations,
        "curves": curves,
    }
