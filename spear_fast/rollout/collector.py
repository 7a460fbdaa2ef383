"""Many trajectories at once: one coroutine each, no barrier between turns, results in a fixed order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from spear_fast.envs.base import TaskSet
from spear_fast.rollout.collection import Collection
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import Chat, Episode, EpisodeLimits
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Task, Trajectory


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
        share: Sequence[int] | None = None,
    ) -> Collection:
        """Roll out `group_size` trajectories for each task.

        Args:
            tasks: One group each, in the order of the result; on several ranks the tasks of all of them.
            group_size: Trajectories per task, G.
            tag: Names this collection, e.g. "train/12"; with the run's seed it fixes all draws.
            first_uid: The trajectory at place k, of task k // G, gets uid `first_uid + k`.
            temperature: Instead of the limits' own; 0 is greedy.
            share: Places in `tasks` that this rank rolls out, ascending; None takes all. Ids and draws follow from a
                trajectory's place in the whole list, so they do not depend on how it is shared.

        Returns:
            The groups of the share, whose ids are their places in `tasks`; failed trajectories included.
        """
        limits = self._limits if temperature is None else replace(self._limits, temperature=temperature)
        groups: list[Group] = []
        episodes: deque[Episode] = deque()
        for index in range(len(tasks)) if share is None else share:
            group = Group(index, tasks[index], [])
            groups.append(group)
            for sample in range(group_size):
                place = index * group_size + sample
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
        return Collection(groups, time.perf_counter() - started)

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
