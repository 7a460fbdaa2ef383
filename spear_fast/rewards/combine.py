"""The total reward R = R_outcome + mu * R_tool of every usable trajectory."""

from __future__ import annotations

from ..types import Group, Trajectory
from .breakdown import success_by_type
from .outcome import outcome_reward
from .tool_call import Count, Variant, intrinsic_reward


def score(groups: list[Group], *, mu: float, variant: Variant, count: Count, per_call: float) -> dict[str, float]:
    """Fill `intrinsic_reward` and `reward` of every usable trajectory; return the statistics of `reward/`.

    `mu` is the weight of this step (`schedules.intrinsic_weight`); `variant`, `count` and `per_call` are those of
    `tool_call.intrinsic_reward`. Success is also given by task type, as `reward/success/<type>`. Unusable trajectories
    are left as they are, and with none usable only `reward/mu` is returned. Raises TaskError for an outcome that is not
    finite, ValueError for an unknown variant or count.
    Source: SPEAR (arXiv 2509.22601), R = R_outcome + mu(step) * R_tool.
    """
    usable = [trajectory for group in groups for trajectory in group.trajectories if trajectory.status.usable]
    for trajectory in usable:
        outcome = outcome_reward(trajectory)
        trajectory.intrinsic_reward = intrinsic_reward(
            trajectory, outcome, variant=variant, count=count, per_call=per_call
        )
        trajectory.reward = outcome + mu * trajectory.intrinsic_reward
    return {"reward/mu": mu, **_means(usable)}


def _means(trajectories: list[Trajectory]) -> dict[str, float]:
    if not trajectories:
        return {}
    sums = {
        "reward/mean": sum(trajectory.reward for trajectory in trajectories),
        "reward/outcome_mean": sum(trajectory.outcome_reward for trajectory in trajectories),
        "reward/intrinsic_mean": sum(trajectory.intrinsic_reward for trajectory in trajectories),
        "reward/success_rate": sum(trajectory.success for trajectory in trajectories),
        "reward/tool_calls_mean": sum(trajectory.num_tool_calls for trajectory in trajectories),
    }
    means = {name: total / len(trajectories) for name, total in sums.items()}
    return means | success_by_type(trajectories, "reward/success")
