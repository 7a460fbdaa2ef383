"""Many trajectories at once: order, bounds, overlap of slow tools, and what failures do to a step."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.errors import EngineError
from spear_fast.rollout.collection import merge, refuse_total_failure, rollout_stats
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.rollout.test_episode import LIMITS
from tests.toys import GuessEnv, GuessTasks


class SlowEnv(GuessEnv):
    running = 0
    most = 0

    async def step(self, text):
        SlowEnv.running += 1
        SlowEnv.most = max(SlowEnv.most, SlowEnv.running)
        await asyncio.sleep(0.05)
        SlowEnv.running -= 1
        return await super().step(text)


class FlakyTasks(GuessTasks):
    """Every `period`-th environment raises."""

    def __init__(self, period: int, environment: Callable = GuessEnv) -> None:
        self._period, self._made, self._environment = period, 0, environment

    def make(self):
        self._made += 1
        env = self._environment()
        if self._period and self._made % self._period == 0:
            env.step = None
        return env


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["digit? user assistant 0123456789"] * 9, 290))


def tasks_for(count: int) -> list[Task]:
    return [Task("guess", "train", index, seed=index) for index in range(count)]


def collector(chat: Chat, tasks: GuessTasks, concurrent: int = 64) -> Collector:
    engine = ScriptedEngine(lambda request: chat.message(str(request.seed % 10)))
    return Collector(tasks, engine, chat, LIMITS, max_concurrent=concurrent, seed=3)


def test_groups_come_in_the_order_of_the_tasks_with_their_uids(chat):
    collection = collector(chat, FlakyTasks(0)).collect(tasks_for(5), 4, tag="train/0", first_uid=100)
    groups, stats = collection.groups, rollout_stats(collection)
    assert [group.task.index for group in groups] == list(range(5))
    assert [t.uid for group in groups for t in group.trajectories] == list(range(100, 120))
    assert stats["rollout/trajectories"] == 20 and stats["rollout/status_ok_frac"] == 1.0


def test_draws_depend_on_run_seed_tag_and_place_only(chat):
    def texts(concurrent: int, tag: str) -> list[str]:
        groups = collector(chat, FlakyTasks(0), concurrent).collect(tasks_for(5), 4, tag=tag).groups
        return [t.messages[-1]["content"] for group in groups for t in group.trajectories]

    assert texts(64, "a") == texts(2, "a") != texts(64, "b")


def test_ranks_together_roll_out_what_one_would_alone(chat):
    def record(parts) -> list[tuple]:
        return [
            (group.group_id, group.task.index, t.uid, t.sample, t.group_id, t.messages[-1]["content"])
            for group in merge(parts).groups
            for t in group.trajectories
        ]

    def parts(shares):
        arguments = {"tag": "train/3", "first_uid": 40}
        return [collector(chat, FlakyTasks(0)).collect(tasks_for(5), 4, share=share, **arguments) for share in shares]

    alone = record(parts([None]))
    assert [row[:3] for row in alone] == [(place // 4, place // 4, 40 + place) for place in range(20)]
    assert record(parts([range(1, 5, 2), range(0, 5, 2)])) == alone
    assert record(parts([(), [0, 1, 4], (2, 3)])) == alone


def test_statistics_of_all_ranks_take_the_slowest_ones_time(chat):
    parts = [collector(chat, FlakyTasks(0)).collect(tasks_for(2), 4, tag="t", share=[rank]) for rank in range(2)]
    sampled = sum(t.num_action_tokens for part in parts for group in part.groups for t in group.trajectories)
    stats = rollout_stats(
        merge([replace(part, seconds=seconds) for part, seconds in zip(parts, (2.0, 4.0), strict=True)])
    )
    assert stats["rollout/trajectories"] == 8 and stats["rollout/tokens_per_s"] == sampled / 4


def test_concurrency_is_used_and_bounded(chat):
    SlowEnv.most = 0
    collector(chat, FlakyTasks(0, SlowEnv), concurrent=8).collect(tasks_for(4), 8, tag="t")
    assert SlowEnv.most == 8


def test_failures_are_counted_and_kept_apart(chat):
    collection = collector(chat, FlakyTasks(4)).collect(tasks_for(4), 4, tag="t")
    stats = rollout_stats(collection)
    failed = [t for group in collection.groups for t in group.trajectories if t.status is Status.ENV_ERROR]
    assert len(failed) == 4 and stats["rollout/status_env_error_frac"] == 0.25


def test_an_interrupt_ends_the_collection_and_the_next_one_works(chat):
    class Interrupting(GuessEnv):
        async def step(self, text):
            if not signalled:
                signalled.append(1)
                signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(30)

    flaky = FlakyTasks(0, Interrupting)
    aborted, signalled = [], []
    one = collector(chat, flaky)
    one._engine.abort = lambda: aborted.append(1)
    # A background job inherits an ignored SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            one.collect(tasks_for(2), 2, tag="t")
    finally:
        signal.signal(signal.SIGINT, inherited)
    flaky._environment = GuessEnv
    assert aborted and rollout_stats(one.collect(tasks_for(2), 2, tag="t"))["rollout/status_ok_frac"] == 1.0


def test_a_task_set_that_cannot_make_an_environment_costs_that_trajectory_only(chat):
    class Full(GuessTasks):
        made = 0

        def make(self):
            Full.made += 1
            if Full.made == 2:
                raise OSError("too many open files")
            return GuessEnv()

    groups = collector(chat, Full(None, 0)).collect(tasks_for(1), 4, tag="t").groups
    (failed,) = [t for t in groups[0].trajectories if not t.status.usable]
    assert failed.status is Status.ENV_ERROR and "too many open files" in str(failed.error)


def test_a_step_in_which_everything_failed_is_an_error_with_its_cause(chat):
    failed = collector(chat, FlakyTasks(1)).collect(tasks_for(2), 2, tag="t").groups
    with pytest.raises(EngineError, match=r"all 4 trajectories .* env_error: TypeError"):
        refuse_total_failure(failed)
    refuse_total_failure(failed + collector(chat, FlakyTasks(0)).collect(tasks_for(1), 1, tag="t").groups)
    refuse_total_failure([])
