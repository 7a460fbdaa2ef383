"""Partial rollouts: more groups in flight than a step needs; stragglers are paused and go on in the next step."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from spear_fast.envs.base import TaskSet
from spear_fast.errors import EngineError
from spear_fast.rollout.collection import Collection
from spear_fast.rollout.collector import Collector, Part
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import Chat, EpisodeLimits
from spear_fast.rollout.gate import Gate
from spear_fast.types import Group, Task


@dataclass(eq=False)
class _Held:
    """A group that was started and not handed out."""

    group: Group
    step: int
    """In which it was started."""
    unfinished: int
    """Trajectories that have not ended."""


class PartialCollector(Collector):
    """Keeps `ceil(oversample * prompts_per_step)` groups over all ranks between the steps.

    Each rank keeps its share of that number constant: it gets as many new tasks as it handed out groups in the step
    before. Paused trajectories stay where they are, as suspended coroutines of the collector's event loop; a
    collection of another kind, an evaluation, lets them go on until it ends.
    """

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
        oversample: float,
        max_stale_steps: int,
    ) -> None:
        """
        Args:
            tasks, engine, chat, limits, max_concurrent, seed, refill_attempts: As of `Collector`.
            oversample: Groups in flight, as a multiple of those that a step needs.
            max_stale_steps: A group that was started this many steps ago is waited for. A step hands out the oldest
                finished groups first, so that none is older then, as long as `oversample` is at most 2.
        """
        super().__init__(
            tasks,
            engine,
            chat,
            limits,
            max_concurrent=max_concurrent,
            seed=seed,
            refill_attempts=refill_attempts,
        )
        self._oversample = oversample
        self._max_stale_steps = max_stale_steps
        self._gate = Gate(engine)
        self._places = asyncio.Semaphore(max_concurrent)
        self._advanced = asyncio.Event()
        self._held: list[_Held] = []
        self._played: set[asyncio.Task[None]] = set()
        self._is_filled = False
        self._is_paused = False

    def wanted(self, prompts_per_step: int) -> int:
        """Return how many tasks the next step starts over all ranks: more in the first one, to fill up."""
        in_flight = math.ceil(round(self._oversample * prompts_per_step, 6))
        return prompts_per_step if self._is_filled else in_flight

    def pending_tasks(self) -> list[Task]:
        """Return this rank's tasks whose groups were not handed out, oldest first."""
        return [held.group.task for held in self._held]

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
        """Start the groups of new tasks and return the oldest finished ones; see `Collector.collect_step`.

        Group ids count on from step to step: task k gets `first_uid // group_size + k`.

        Raises:
            EngineError: Fewer than `num_groups` groups are in flight.
        """
        groups, parts = self._prepare(
            tasks,
            group_size,
            share,
            tag=f"train/{step}",
            first_uid=first_uid,
            limits=self._limits,
            sampler=self._gate,
            first_group=first_uid // group_size,
        )
        if num_groups > len(self._held) + len(groups):
            raise EngineError(
                f"a step asks for {num_groups} groups and {len(self._held) + len(groups)} are in flight; start as "
                "many tasks as PartialCollector.wanted says"
            )
        started = time.perf_counter()
        self._run(self._run_step(groups, parts, step, num_groups))
        self._is_filled = True
        finished = [held for held in self._held if not held.unfinished][:num_groups]
        self._held = [held for held in self._held if held not in finished]
        num_paused = sum(held.unfinished > 0 for held in self._held)
        return self._collection([held.group for held in finished], started, num_paused, self._take_replaced())

    async def _run_step(self, groups: list[Group], parts: deque[Part], step: int, num_groups: int) -> None:
        for group in groups:
            held = _Held(group, step, len(group.trajectories))
            self._held.append(held)
            for _ in range(len(group.trajectories)):
                task = asyncio.create_task(self._play_held(held, parts.popleft()))
                self._played.add(task)
                task.add_done_callback(self._played.discard)
        self._go_on()
        while not self._has_enough(step, num_groups):
            self._advanced.clear()
            await self._advanced.wait()
        await self._stand_still()

    async def _run_all(self, parts: deque[Part], refill_attempts: int) -> None:
        self._go_on()
        await super()._run_all(parts, refill_attempts)
        await self._stand_still()

    async def _play_held(self, held: _Held, part: Part) -> None:
        async with self._places, self._gate.outing():
            await self._play(*part, self._refill_attempts)
        held.unfinished -= 1
        self._advanced.set()

    def _has_enough(self, step: int, num_groups: int) -> bool:
        """Whether the step's groups are finished, and those that became too old."""
        overdue = [held for held in self._held if step - held.step >= self._max_stale_steps]
        finished = sum(not held.unfinished for held in self._held)
        return finished >= num_groups and not any(held.unfinished for held in overdue)

    def _go_on(self) -> None:
        if self._is_paused:
            self._engine.resume()
            self._is_paused = False
        self._gate.open()

    async def _stand_still(self) -> None:
        """Take unfinished trajectories off the engine, and let tools and environments that are at work finish."""
        self._gate.shut()
        if any(held.unfinished for held in self._held):
            self._engine.pause()
            self._is_paused = True
        await self._gate.nobody_at_large()

    def drop(self) -> None:
        """Forget every group that was started and not returned; ask `pending_tasks` for them before the step."""
        self._give_up()

    def _give_up(self) -> None:
        super()._give_up()
        self._held.clear()
        self._is_filled = self._is_paused = False
        self._gate.open()

        async def end() -> None:
            played = list(self._played)
            for task in played:
                task.cancel()
            await asyncio.gather(*played, return_exceptions=True)

        self._runner.run(end())
