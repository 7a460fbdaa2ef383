"""The outcome reward: what the environment gave, checked to be a number."""

from __future__ import annotations

import math

from ..errors import TaskError
from ..types import Trajectory


def outcome_reward(trajectory: Trajectory) -> float:
    """Return R_outcome, the sum of the environment's rewards.

    Raises TaskError if it is not finite: one NaN would spread to the advantages of the whole group.
    """
    reward = trajectory.outcome_reward
    if not math.isfinite(reward):
        raise TaskError(
            f"outcome_reward={reward} of task {trajectory.task.name!r}, split {trajectory.task.split!r}, index "
            f"{trajectory.task.index} is not finite; make the environment return finite rewards"
        )
    return reward
