"""What one collection of trajectories brought: joined over ranks, counted, and refused when everything failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spear_fast.errors import EngineError
from spear_fast.types import Group, Status


class Failure(NamedTuple):
    """How a trajectory failed, e.g. `Failure(Status.TOOL_TIMEOUT, "tool search did not answer within 30.0 s")`."""

    status: Status
    error: str | None


@dataclass(frozen=True)
class Collection:
    """The groups that one rank, or after `merge` all ranks, rolled out."""

    groups: list[Group]
    """In the order of their ids; failed trajectories included."""
    seconds: float
    """Wall time."""
    version: int
    """Policy version, in training steps, that the engine had."""
    num_paused: int = 0
    """Groups that wait for the next step."""
    replaced: tuple[Failure, ...] = ()
    """Trajectories that failed and were played again."""
    threads_left: int = 0
    """Threads of tools and rewards that still run although they timed out."""


def merge(parts: Sequence[Collection]) -> Collection:
    """Return the collections of all ranks as one, the same whatever the number of ranks but for its seconds.

    Args:
        parts: One collection per rank, in any order; no group occurs twice.
    """
    groups = sorted((group for part in parts for group in part.groups), key=lambda group: group.group_id)
    return Collection(
        groups,
        seconds=max(part.seconds for part in parts),
        version=max(part.version for part in parts),
        num_paused=sum(part.num_paused for part in parts),
        replaced=tuple(failure for part in parts for failure in part.replaced),
        threads_left=sum(part.threads_left for part in parts),
    )


def rollout_stats(collection: Collection) -> dict[str, float]:
    """Return counts, lengths, statuses and speed `rollout/...` of a collection, or of all ranks' after `merge`.

    The shares of statuses are those of all attempts, so that failures show although they were played again.
    """
    trajectories = [trajectory for group in collection.groups for trajectory in group.trajectories]
    count = max(1, len(trajectories))
    sampled = sum(trajectory.num_action_tokens for trajectory in trajectories)
    statuses = Counter(trajectory.status for trajectory in trajectories)
    statuses.update(failure.status for failure in collection.replaced)
    attempts = count + len(collection.replaced)
    lags = [collection.version - trajectory.version for trajectory in trajectories if trajectory.turns]
    stats = {
        "rollout/trajectories": float(len(trajectories)),
        "rollout/refilled": float(len(collection.replaced)),
        "rollout/rows_mean": sum(len(trajectory.row_starts) for trajectory in trajectories) / count,
        "rollout/turns_mean": sum(len(trajectory.turns) for trajectory in trajectories) / count,
        "rollout/sampled_tokens_mean": sampled / count,
        "rollout/tokens_per_s": sampled / max(collection.seconds, 1e-9),
        "rollout/version_lag_mean": sum(lags) / max(1, len(lags)),
        "rollout/paused_groups": float(collection.num_paused),
        "rollout/threads_left": float(collection.threads_left),
    }
    return stats | {f"rollout/status_{status.value}_frac": statuses[status] / attempts for status in Status}


def refuse_total_failure(groups: Sequence[Group]) -> None:
    """Raise EngineError, which quotes the first error, if there are trajectories and all of them failed."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [trajectory for trajectory in trajectories if not trajectory.status.usable]
    if failed and len(failed) == len(trajectories):
        raise EngineError(
            f"all {len(failed)} trajectories of this step failed; the first ended as {failed[0].status.value}: "
            f"{failed[0].error}"
        )
