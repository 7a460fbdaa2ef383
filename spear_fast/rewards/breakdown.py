"""Success by kind of task."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..types import Trajectory


def success_by_type(trajectories: Iterable[Trajectory], prefix: str) -> dict[str, float]:
    """Return the share of successes of each `task_type` as `<prefix>/<type>`; trajectories without one are left out.

    Characters that are no letters, digits, dots or dashes become underscores, so that the names suit every sink.
    """
    outcomes: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        if trajectory.task_type is not None:
            name = re.sub(r"[^\w.-]", "_", trajectory.task_type)
            outcomes.setdefault(f"{prefix}/{name}", []).append(trajectory.success)
    return {name: sum(outcomes[name]) / len(outcomes[name]) for name in sorted(outcomes)}
