"""Many trajectories at once: one coroutine each, no barrier between turns, results in a fixed order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from spear_fast.envs.base import TaskSet
from spear_fast.envs.threads import threads_left
from spear_fast.errors import EngineError
from spear_fast.rollout.collection import Collection
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import Chat, Episode, EpisodeLimits, Sampler
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
        self._tool_runner = limits.tool_runner()
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
        groups, episodes = self._prepare(
            tasks, group_size, share, tag=tag, first_uid=first_uid, limits=limits, sampler=self._engine
        )
        started = time.perf_counter()
        self._run(self._run_all(episodes))
        return self._collection(groups, started)

    def wanted(self, prompts_per_step: int) -> int:
        """Return how many tasks the next step starts over all ranks, given how many groups it needs."""
        return prompts_per_step

    def collect_step(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        step: int,
        num_groups: int,
        first_uid: int,
        share: Sequence[int] | None = None,
    ) -> Collection:
        """Roll out the groups of one training step.

        Args:
            tasks: As many new ones as `wanted` says, those of all ranks.
            group_size: Trajectories per task, G.
            step: The training step, which fixes the draws.
            num_groups: Groups that this rank shall return.
            first_uid: Trajectories started before in the run; those of `tasks` get the next uids.
            share: Places in `tasks` that are this rank's, as many as `num_groups`; None takes all.
        """
        return self.collect(tasks, group_size, tag=f"train/{step}", first_uid=first_uid, share=share)

    def pending_tasks(self) -> list[Task]:
        """Return this rank's tasks that were started and whose groups no step has returned: none."""
        return []

    def drop(self) -> None:
        """Forget every group that was started and not returned; their tasks are lost unless the caller has them."""

    def close(self) -> None:
        """End the event loop."""
        self._runner.close()

    def _prepare(
        self,
        tasks: Sequence[Task],
        group_size: int,
        share: Sequence[int] | None,
        *,
        tag: str,
        first_uid: int,
        limits: EpisodeLimits,
        sampler: Sampler,
        first_group: int = 0,
    ) -> tuple[list[Group], deque[Episode]]:
        """The empty groups of a share, and their episodes in the same order."""
        groups: list[Group] = []
        episodes: deque[Episode] = deque()
        for index in range(len(tasks)) if share is None else share:
            group = Group(first_group + index, tasks[index], [])
            groups.append(group)
            for sample in range(group_size):
                place = index * group_size + sample
                trajectory = Trajectory(group.task, group.group_id, sample, first_uid + place, version=0)
                group.trajectories.append(trajectory)
                seed = derive_seed(self._seed, tag, place)
                episodes.append(Episode(trajectory, self._tasks, sampler, self._chat, limits, seed, self._tool_runner))
        return groups, episodes

    def _collection(self, groups: list[Group], started: float, num_paused: int = 0) -> Collection:
        return Collection(
            groups, time.perf_counter() - started, self._engine.weights_version, num_paused, threads_left()
        )

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the event loop until `work` is done, with the engine awake."""
        self._switch(self._engine.wake)
        try:
            self._runner.run(work)
        except BaseException:
            self._give_up()
            raise
        finally:
            self._switch(self._engine.sleep)

    def _switch(self, action: Callable[[], None]) -> None:
        """Wake or put to sleep; an engine that died does neither, and its trajectories tell so by their status."""
        try:
            action()
        except EngineError:
            if self._engine.alive:
                raise

    def _give_up(self) -> None:
        self._engine.abort()

    async def _run_all(self, episodes: deque[Episode]) -> None:
        async def work() -> None:
            with self._engine.participant():
                while episodes:
                    await episodes.popleft().run()

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self._max_concurrent, len(episodes))):
                workers.create_task(work())
