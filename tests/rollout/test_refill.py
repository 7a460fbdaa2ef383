"""Failed trajectories are played again within their step, with their own draws, and stay visible."""

from __future__ import annotations

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.errors import EngineError
from spear_fast.rollout.collection import Collection, merge, refuse_total_failure, rollout_stats
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.partial import PartialCollector
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.rollout.test_collector import tasks_for
from tests.rollout.test_episode import LIMITS
from tests.toys import GuessEnv, GuessTasks

G = 3


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["digit? user assistant 0123456789"] * 9, 290))


class BreakingTasks(GuessTasks):
    """The environment of a task fails as often as `failures` says for its index, over all its samples."""

    def __init__(self, failures: dict[int, int]) -> None:
        self.failures = dict(failures)

    def make(self):
        tasks = self

        class Env(GuessEnv):
            async def reset(self, *, seed, options):
                if tasks.failures.get(options["index"], 0) > 0:
                    tasks.failures[options["index"]] -= 1
                    raise OSError("the simulator broke")
                return await super().reset(seed=seed, options=options)

        return Env()


class Broken(ScriptedEngine):
    """Aborts the first `count` requests of each trajectory, and counts them."""

    def __init__(self, reply, count: int) -> None:
        super().__init__(reply)
        self.count, self.asked = count, {}

    async def generate(self, request):
        self.asked[request.uid] = self.asked.get(request.uid, 0) + 1
        if self.asked[request.uid] <= self.count:
            raise EngineError("no room")
        return await super().generate(request)


def make(chat: Chat, mode: str, tasks: GuessTasks, engine=None, refill_attempts=1, max_concurrent=64) -> Collector:
    engine = engine or ScriptedEngine(lambda request: chat.message(str(request.seed % 10)))
    settings = {"max_concurrent": max_concurrent, "seed": 3, "refill_attempts": refill_attempts}
    if mode == "sync":
        return Collector(tasks, engine, chat, LIMITS, **settings)
    return PartialCollector(tasks, engine, chat, LIMITS, **settings, oversample=1.0, max_stale_steps=2)


def step(collector: Collector, count: int = 4) -> Collection:
    return collector.collect_step(tasks_for(count), G, step=0, num_groups=count, first_uid=30)


def texts(collection: Collection) -> list[str]:
    return [t.messages[-1]["content"] for group in collection.groups for t in group.trajectories]


@pytest.mark.parametrize("mode", ["sync", "partial"])
def test_failed_trajectories_are_played_again_in_their_place(chat, mode):
    whole = step(make(chat, mode, BreakingTasks({})))
    mended = step(make(chat, mode, BreakingTasks({1: 2}), refill_attempts=2, max_concurrent=1))
    trajectories = [t for group in mended.groups for t in group.trajectories]
    assert [(t.uid, t.sample) for t in trajectories] == [(30 + k, k % G) for k in range(4 * G)]
    assert all(t.group_id == group.group_id for group in mended.groups for t in group.trajectories)
    assert all(t.status is Status.OK and t.turns and t.error is None for t in trajectories)
    same = [a == b for a, b in zip(texts(whole), texts(mended), strict=True)]
    assert all(same[:G] + same[G + 1 :]), "trajectories that did not fail keep their draws"
    assert not all(same), "the repeats drew the same"
    assert texts(step(make(chat, mode, BreakingTasks({1: 2}), refill_attempts=2, max_concurrent=1))) == texts(mended)
    stats = rollout_stats(mended)
    assert (stats["rollout/refilled"], stats["rollout/trajectories"]) == (2, 12)
    assert stats["rollout/status_env_error_frac"] == 2 / 14 and stats["rollout/status_ok_frac"] == 12 / 14
    assert {failure.status for failure in mended.replaced} == {Status.ENV_ERROR}
    assert "the simulator broke" in str(mended.replaced[0].error)
    assert rollout_stats(merge([mended, whole]))["rollout/refilled"] == 2


@pytest.mark.parametrize("mode", ["sync", "partial"])
def test_after_the_last_attempt_a_failure_stays(chat, mode):
    collector = make(chat, mode, BreakingTasks({0: 3 * G}), refill_attempts=2)
    collection = step(collector)
    assert [t.status for t in collection.groups[0].trajectories] == [Status.ENV_ERROR] * G
    assert rollout_stats(collection)["rollout/refilled"] == 2 * G
    assert rollout_stats(step(collector))["rollout/refilled"] == 0, "failures are told once"


def test_requests_that_the_engine_gave_up_are_asked_again_but_not_those_of_a_dead_one(chat):
    engine = Broken(lambda request: chat.message("7"), count=1)
    collection = step(make(chat, "sync", GuessTasks(None, 0), engine))
    assert [t.status for group in collection.groups for t in group.trajectories] == [Status.OK] * 12
    assert {failure.status for failure in collection.replaced} == {Status.ENGINE_ABORT}
    dead = Broken(lambda request: chat.message("7"), count=9)
    dead.alive = False
    collection = step(make(chat, "sync", GuessTasks(None, 0), dead))
    assert not collection.replaced and set(dead.asked.values()) == {1}


def test_a_total_failure_is_still_an_error(chat):
    collection = step(make(chat, "sync", BreakingTasks(dict.fromkeys(range(4), 99))))
    with pytest.raises(EngineError, match=r"all 12 trajectories .* the simulator broke"):
        refuse_total_failure(collection.groups)


def test_evaluations_are_not_refilled(chat):
    collector = make(chat, "sync", BreakingTasks({0: 1}))
    collection = collector.collect([Task("guess", "eval", 0, 0)], 2, tag="eval")
    assert sorted(t.status.value for t in collection.groups[0].trajectories) == ["env_error", "ok"]
    assert not collection.replaced
