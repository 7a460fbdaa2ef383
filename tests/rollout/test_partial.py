"""Partial rollouts: stragglers pause and go on, nothing is lost or handed out twice, and no clock runs meanwhile."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.errors import EngineError
from spear_fast.rollout.collection import Collection, merge, rollout_stats
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.rollout.partial import PartialCollector
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.rollout.test_episode import LIMITS
from tests.toys import GuessEnv, GuessTasks

G = 2
NEVER = 1 << 30


class TickingEngine(ScriptedEngine):
    """Answers a request after `ticks(request)` rounds of the event loop; rounds while paused do not count."""

    def __init__(self, chat: Chat, ticks: Callable[[GenerationRequest], int]) -> None:
        super().__init__(lambda request: chat.message("7"))
        self.is_paused = self.is_asleep = False
        self.ticks = ticks
        self.running = self.most = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        assert not self.is_paused, "the gate let a request through"
        version = self.weights_version
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(self.ticks(request)):
            await asyncio.sleep(0)
            while self.is_paused:
                await asyncio.sleep(0.001)
            assert not self.is_asleep, "a request ran while the engine slept"
        self.running -= 1
        return replace(await super().generate(request), version=version)

    def pause(self) -> None:
        assert not self.is_paused and not self.is_asleep
        self.is_paused = True

    def resume(self) -> None:
        assert self.is_paused and not self.is_asleep
        self.is_paused = False

    def abort(self) -> None:
        self.is_paused = False

    def sleep(self) -> None:
        self.is_asleep = True

    def wake(self) -> None:
        self.is_asleep = False


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["digit? user assistant 0123456789"] * 9, 290))


@pytest.fixture
def start(chat):
    """Return `Run` with its first argument filled in; what it made is closed after the test."""
    made = []

    def make(*arguments, **settings) -> Run:
        made.append(Run(chat, *arguments, **settings))
        return made[-1]

    yield make
    for run in made:
        run.collector.close()


class Run:
    """A trainer's view of a partial collector on one of `size` ranks."""

    def __init__(self, chat, slow=None, *, tasks=None, rank=0, size=1, prompts=4, **settings) -> None:
        self.slow = slow or {}
        self.engine = TickingEngine(chat, lambda request: self.slow.get(request.uid // G, 1))
        settings = {"oversample": 1.5, "max_stale_steps": 2, "limits": LIMITS, "max_concurrent": 64} | settings
        limits = settings.pop("limits")
        self.collector = PartialCollector(tasks or GuessTasks(None, 0), self.engine, chat, limits, seed=3, **settings)
        self.rank, self.size, self.prompts = rank, size, prompts
        self.drawn = self.steps = 0

    def step(self) -> Collection:
        count = self.collector.wanted(self.prompts)
        tasks = [Task("guess", "train", self.drawn + k, seed=0) for k in range(count)]
        collection = self.collector.collect_step(
            tasks,
            G,
            step=self.steps,
            num_groups=len(range(self.rank, self.prompts, self.size)),
            first_uid=self.drawn * G,
            share=range(self.rank, count, self.size),
        )
        self.drawn += count
        self.steps += 1
        self.engine.weights_version += 1
        return collection

    def ids(self) -> list[int]:
        return [group.group_id for group in self.step().groups]

    def pending(self) -> list[int]:
        return [task.index for task in self.collector.pending_tasks()]


def test_stragglers_are_paused_and_finished_groups_come_first_next_time(start):
    run = start(slow={1: 200})
    assert run.ids() == [0, 2, 3, 4]
    assert run.pending() == [1, 5] and run.engine.is_paused
    run.slow |= dict.fromkeys(range(6, 10), 100)
    step = run.step()
    assert [group.group_id for group in step.groups] == [5, 6, 7, 8], "5 was finished in the step before"
    assert step.version == 1 and [g.trajectories[0].version for g in step.groups] == [0, 1, 1, 1]
    assert rollout_stats(step)["rollout/version_lag_mean"] == 0.25
    assert step.num_paused == 1 and run.pending() == [1, 9]


def test_a_group_that_is_too_old_is_waited_for(start):
    run = start(slow={0: 5000})
    assert [run.ids(), run.ids()] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    step = run.step()
    assert step.groups[0].group_id == 0
    assert [t.version for t in step.groups[0].trajectories] == [0, 0] and step.version == 2


@pytest.mark.parametrize("size", [1, 3])
def test_over_a_run_every_task_is_handed_out_once_and_none_too_old(start, size):
    draws = random.Random(0)
    slow = {group: draws.choice([1, 5, 60, 400]) for group in range(200)}
    ranks = [start(slow, rank=rank, size=size) for rank in range(size)]
    handed: list[int] = []
    paused = 0
    for step in range(20):
        collection = merge([run.step() for run in ranks])
        assert len(collection.groups) == 4
        paused += collection.num_paused
        trajectories = [t for group in collection.groups for t in group.trajectories]
        assert all(t.status is Status.OK and t.success for t in trajectories)
        handed += (ids := [group.group_id for group in collection.groups])
        assert [t.uid for t in trajectories] == [group_id * G + sample for group_id in ids for sample in range(G)]
        assert all(group.task.index == group.group_id for group in collection.groups)
        # Six groups begin in the first step and four in each later one.
        assert all(step - max(0, (group.group_id - 2) // 4) <= 2 for group in collection.groups)
    pending = [index for run in ranks for index in run.pending()]
    assert sorted(handed + pending) == list(range(6 + 19 * 4)) and len(pending) == 2
    assert handed != sorted(handed) and paused, "no straggler was overtaken, so this tested nothing"


class TalkingEnv(GuessEnv):
    """Takes two messages, and time for the first one."""

    at_work = 0
    open = 0

    async def reset(self, *, seed, options):
        TalkingEnv.open += 1
        self._slow, self._said = options["index"] == 0, 0
        return await super().reset(seed=seed, options=options)

    async def step(self, text):
        self._said += 1
        if self._said == 2:
            return await super().step(text)
        TalkingEnv.at_work += 1
        await asyncio.sleep(0.05 if self._slow else 0)
        TalkingEnv.at_work -= 1
        return "again?", 0.0, False, False, {}

    async def close(self):
        TalkingEnv.open -= 1


class TalkingTasks(GuessTasks):
    def make(self):
        return TalkingEnv()


def test_tools_and_environments_finish_before_a_step_ends_so_that_no_timeout_passes_in_training(start):
    run = start(tasks=TalkingTasks(None, 0), limits=replace(LIMITS, env_timeout_s=1.0))
    assert run.ids() == [1, 2, 3, 4]
    assert TalkingEnv.at_work == 0, "an environment was left at work"
    time.sleep(1.1)
    groups = run.step().groups
    assert groups[0].group_id == 0 and {t.status for t in groups[0].trajectories} == {Status.OK}
    assert [len(t.turns) for t in groups[0].trajectories] == [2, 2]


def test_evaluation_runs_while_training_groups_are_paused(start):
    run = start(slow={0: NEVER})
    run.step()
    evaluation = run.collector.collect([Task("guess", "eval", 0, seed=0)] * 3, 1, tag="eval", first_uid=1 << 40)
    assert [group.group_id for group in evaluation.groups] == [0, 1, 2]
    assert all(t.success and t.uid >= 1 << 40 for group in evaluation.groups for t in group.trajectories)
    assert run.pending() == [0, 5] and run.engine.is_paused
    run.slow.clear()
    run.engine.ticks = lambda request: 1
    assert run.ids() == [5, 6, 7, 8]


def test_fewer_places_than_trajectories(start):
    run = start(slow={0: 300}, max_concurrent=3)
    assert run.ids() == [1, 2, 3, 4] and run.ids() == [5, 6, 7, 8]
    assert run.ids()[0] == 0
    assert run.engine.most == 3


def test_an_interrupt_drops_everything_and_the_collector_can_be_used_again(start):
    TalkingEnv.open = 0
    run = start(slow={0: NEVER}, tasks=TalkingTasks(None, 0))
    run.step()
    pending = run.pending()
    assert TalkingEnv.open == G

    def interrupt(request: GenerationRequest) -> int:
        run.engine.ticks = lambda request: NEVER
        signal.raise_signal(signal.SIGINT)
        return NEVER

    run.engine.ticks = interrupt
    # A background job inherits an ignored SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.step()
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert pending == [0, 5] and run.pending() == [] and TalkingEnv.open == 0
    assert run.collector.wanted(4) == 6
    run.engine.ticks = lambda request: 1
    assert len(run.ids()) == 4


def test_closing_ends_paused_trajectories_and_their_environments(start):
    TalkingEnv.open = 0
    run = start(slow={0: NEVER}, tasks=TalkingTasks(None, 0))
    run.step()
    assert TalkingEnv.open == G
    run.collector.close()
    assert TalkingEnv.open == 0


def test_a_step_that_could_never_end_is_an_error(start):
    run = start()
    with pytest.raises(EngineError, match=r"asks for 4 groups and 1 are in flight"):
        run.collector.collect_step([Task("guess", "train", 0, 0)], G, step=0, num_groups=4, first_uid=0)
