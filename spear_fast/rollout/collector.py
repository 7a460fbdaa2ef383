"""Many trajectories at once: one coroutine each, no barrier between turns, results in a fixed order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

from spear_fast.envs.base import TaskSet
from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import Chat, Episode, EpisodeLimits
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Status, Task, Trajectory


class Collector:
    """Rolls out groups of trajectories with an engine. Close it to end its event loop."""

    def __init__(
        self, tasks: TaskSet, engine: Engine, chat: Chat, limits: EpisodeLimits, *, max_concurrent: int, seed: int
    ) -> None:
        """
        Args:
            tasks: Makes one environment per trajectory.
            engine: Shared by all of them.
            chat: Renders and decodes messages.
            limits: Limits of each trajectory.
            max_concurrent: Trajectories in flight.
            seed: Of the run; a draw depends on it, on `tag` and on the trajectory's place only.
        """
        self._tasks = tasks
        self._engine = engine
        self._chat = chat
        self._limits = limits
        self._max_concurrent = max_concurrent
        self._seed = seed
        self._runner = asyncio.Runner()

    def collect(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        tag: str,
        first_uid: int = 0,
        temperature: float | None = None,
    ) -> tuple[list[Group], dict[str, float]]:
        """Roll out `group_size` trajectories for each task.

        Args:
            tasks: One group each, in the order of the result.
            group_size: Trajectories per task, G.
            tag: Names this collection, e.g. "train/12"; with the run's seed it fixes all draws.
            first_uid: Trajectory k of the result gets uid `first_uid + k`.
            temperature: Instead of the limits' own; 0 is greedy.

        Returns:
            The groups, failed trajectories included, and statistics `rollout/...`.

        Raises:
            EngineError: Every trajectory failed; the first error is quoted.
        """
        limits = self._limits if temperature is None else replace(self._limits, temperature=temperature)
        groups = [Group(index, task, []) for index, task in enumerate(tasks)]
        episodes: deque[Episode] = deque()
        for group in groups:
            for sample in range(group_size):
                place = group.group_id * group_size + sample
                trajectory = Trajectory(group.task, group.group_id, sample, first_uid + place, version=0)
                group.trajectories.append(trajectory)
                seed = derive_seed(self._seed, tag, place)
                episodes.append(Episode(trajectory, self._tasks, self._engine, self._chat, limits, seed))
        started = time.perf_counter()
        self._engine.wake()
        try:
            self._runner.run(self._run_all(episodes))
        except BaseException:
            self._engine.abort()
            raise
        finally:
            self._engine.sleep()
        stats = rollout_stats(groups, time.perf_counter() - started)
        _refuse_total_failure(groups)
        return groups, stats

    def close(self) -> None:
        """End the event loop."""
        self._runner.close()

    async def _run_all(self, episodes: deque[Episode]) -> None:
        async def work() -> None:
            with self._engine.participant():
                while episodes:
                    await episodes.popleft().run()

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self._max_concurrent, len(episodes))):
                workers.create_task(work())


def rollout_stats(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Return counts, lengths, statuses and speed of a collection; `seconds` is its wall time."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    count = max(1, len(trajectories))
    sampled = sum(trajectory.num_action_tokens for trajectory in trajectories)
    statuses = Counter(trajectory.status for trajectory in trajectories)
    stats = {
        "rollout/trajectories": float(len(trajectories)),
        "rollout/turns_mean": sum(len(trajectory.turns) for trajectory in trajectories) / count,
        "rollout/sampled_tokens_mean": sampled / count,
        "rollout/tokens_per_s": sampled / max(seconds, 1e-9),
    }
    return stats | {f"rollout/status_{status.value}_frac": statuses[status] / count for status in Status}


def _refuse_total_failure(groups: Sequence[Group]) -> None:
    failed = [t for group in groups for t in group.trajectories if not t.status.usable]
    if failed and len(failed) == sum(len(group.trajectories) for group in groups):
        raise EngineError(
            f"all {len(failed)} trajectories of this step failed; the first ended as {failed[0].status.value}: "
            f"{failed[0].error}"
        )
