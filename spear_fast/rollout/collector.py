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
from spear_fast.rollout.collection import Collection, Failure
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import Chat, Episode, EpisodeLimits, Sampler
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Task, Trajectory

Part = tuple[Group, Episode]
"""An episode and the group that its trajectory belongs to."""


class Collector:
    """Rolls out groups of trajectories with an engine. Close it to end its event loop."""

    def __init__(
        self,
        tasks: TaskSet,
        engine: Engine,
        chat: Chat,
        limits: EpisodeLimits,
        *,
        max_concurrent: int,
        seed: int,
        refill_attempts: int = 0,
    ) -> None:
        """
        Args:
            tasks: Makes one environment per trajectory.
            engine: Shared by all of them.
            chat: Renders and decodes messages.
            limits: Limits of each trajectory.
            max_concurrent: Trajectories in flight.
            seed: Of the run; a draw depends on it, on `tag` and on the trajectory's place only.
            refill_attempts: How often a trajectory of a training step that failed is played again, with draws that
                also depend on the attempt. Evaluations count it as it is: a policy that breaks its environment fails.
        """
        self._tasks = tasks
        self._engine = engine
        self._chat = chat
        self._limits = limits
        self._max_concurrent = max_concurrent
        self._seed = seed
        self._tool_runner = limits.tool_runner()
        self._refill_attempts = refill_attempts
        self._replaced: list[Failure] = []
        self._runner = asyncio.Runner()

    def collect(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        tag: str,
        first_uid: int = 0,
        temperature: float | None = None,
        top_p: float = 1.0,
        share: Sequence[int] | None = None,
        refill: bool = False,
    ) -> Collection:
        """Roll out `group_size` trajectories for each task.

        Args:
            tasks: One group each, in the order of the result; on several ranks the tasks of all of them.
            group_size: Trajectories per task, G.
            tag: Names this collection, e.g. "train/12"; with the run's seed it fixes all draws.
            first_uid: The trajectory at place k, of task k // G, gets uid `first_uid + k`.
            temperature: Instead of the limits' own; 0 is greedy.
            top_p: See `GenerationRequest`; rows that are trained on need 1.
            share: Places in `tasks` that this rank rolls out, ascending; None takes all. Ids and draws follow from a
                trajectory's place in the whole list, so they do not depend on how it is shared.
            refill: Play trajectories that failed again, `refill_attempts` times at most.

        Returns:
            The groups of the share, whose ids are their places in `tasks`; failed trajectories included.
        """
        own = self._limits
        limits = replace(own, temperature=own.temperature if temperature is None else temperature, top_p=top_p)
        groups, parts = self._prepare(
            tasks, group_size, share, tag=tag, first_uid=first_uid, limits=limits, sampler=self._engine
        )
        started = time.perf_counter()
        self._run(self._run_all(parts, self._refill_attempts if refill else 0))
        return self._collection(groups, started, replaced=self._take_replaced() if refill else ())

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
        return self.collect(tasks, group_size, tag=f"train/{step}", first_uid=first_uid, share=share, refill=True)

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
    ) -> tuple[list[Group], deque[Part]]:
        """The groups of a share with empty trajectories, and the episodes that fill these, in the same order."""
        groups: list[Group] = []
        parts: deque[Part] = deque()
        for index in range(len(tasks)) if share is None else share:
            group = Group(first_group + index, tasks[index], [])
            groups.append(group)
            for sample in range(group_size):
                place = index * group_size + sample
                trajectory = Trajectory(group.task, group.group_id, sample, first_uid + place, version=0)
                group.trajectories.append(trajectory)
                seed = derive_seed(self._seed, tag, place)
                episode = Episode(trajectory, self._tasks, sampler, self._chat, limits, seed, self._tool_runner)
                parts.append((group, episode))
        return groups, parts

    async def _play(self, group: Group, episode: Episode, refill_attempts: int) -> None:
        """Play an episode; as long as its trajectory fails, put a new one in its place, at most so many times.

        When the engine is dead every trajectory fails, which is mended elsewhere.
        """
        for attempt in range(1, refill_attempts + 2):
            trajectory = await episode.run()
            if trajectory.status.usable or attempt > refill_attempts or not self._engine.alive:
                return
            self._replaced.append(Failure(trajectory.status, trajectory.error))
            episode = episode.again(attempt)
            group.trajectories[trajectory.sample] = episode.trajectory

    def _take_replaced(self) -> tuple[Failure, ...]:
        replaced, self._replaced = self._replaced, []
        return tuple(replaced)

    def _collection(
        self, groups: list[Group], started: float, num_paused: int = 0, replaced: tuple[Failure, ...] = ()
    ) -> Collection:
        return Collection(
            groups,
            time.perf_counter() - started,
            self._engine.weights_version,
            num_paused,
            replaced,
            threads_left(),
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
        self._replaced.clear()
        self._engine.abort()

    async def _run_all(self, parts: deque[Part], refill_attempts: int) -> None:
        async def work() -> None:
            with self._engine.participant():
                while parts:
                    await self._play(*parts.popleft(), refill_attempts)

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self._max_concurrent, len(parts))):
                workers.create_task(work())
