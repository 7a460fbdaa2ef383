"""Nothing waits for what it does not need: turns for other trajectories, sampling for tools, rewards or stragglers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.prompts import PromptParams, PromptTasks
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.rollout.collection import rollout_stats
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.rollout.test_episode import ECHO, LIMITS
from tests.toys import ToolEnv, ToolTasks, echo

HOLD = '<tool_call>{"name": "hold", "arguments": {}}</tool_call>'


def test_turns_do_not_wait_for_the_tools_of_other_trajectories():
    """Trajectory 0's first tool answers only once trajectory 1 has sampled its third turn."""
    third_turn, log = threading.Event(), []

    def hold() -> str:
        """Wait for the third turn of the other trajectory."""
        log.append("hold")
        assert third_turn.wait(5.0)
        return "held"

    class Tasks(ToolTasks):
        tools = (hold, echo)

        def make(self):
            environment = ToolEnv()
            environment.tools = self.tools
            return environment

    chat = Chat(train_tokenizer([ECHO, HOLD, "digit? user assistant tool 0123456789"] * 9, 300),
                [tool_schema(tool) for tool in Tasks.tools])  # fmt: skip
    script = {0: iter([HOLD, "7"]), 1: iter([ECHO, ECHO, "7"])}

    def reply(request):
        text = next(script[request.uid])
        log.append(f"{request.uid}:{text[12:17]}")
        if request.uid == 1 and text == "7":
            third_turn.set()
        return chat.message(text)

    collector = Collector(Tasks(None, 0), ScriptedEngine(reply), chat, LIMITS, max_concurrent=2, seed=0)
    groups = collector.collect([Task("guess", "train", 0, 0)], 2, tag="t").groups
    collector.close()
    assert [(t.status, len(t.turns), t.success) for t in groups[0].trajectories] == [
        (Status.OK, 2, True),
        (Status.OK, 3, True),
    ]
    assert "hold" in log and groups[0].trajectories[0].num_valid_tool_calls == 1


@pytest.fixture
def collect(tmp_path: Path):
    """Return a function that rolls out 16 trajectories of a prompt set with a reward function of the user's."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"digit {k}?"}) + "\n" for k in range(64)))
    (tmp_path / "own.py").write_text("def reward(completion, **columns): raise NotImplementedError\n")
    params = PromptParams(
        train_file=str(tmp_path / "rows.jsonl"), eval_fraction=0.1, reward=f"{tmp_path / 'own.py'}:reward"
    )
    chat = Chat(train_tokenizer(["digit? user assistant 0123456789"] * 9, 290))
    collectors = []

    def make(reward: Callable, **limits):
        tasks = PromptTasks(params, 0)
        tasks.reward = reward
        engine = ScriptedEngine(lambda request: chat.message("7"))
        collectors.append(
            Collector(tasks, engine, chat, replace(LIMITS, **limits), max_concurrent=16, seed=0),
        )
        return collectors[-1].collect([Task("prompts", "train", k, 0) for k in range(8)], 2, tag="t")

    yield make
    for each in collectors:
        each.close()


def test_rewards_run_beside_each_other_and_off_the_event_loop(collect):
    lock, running, most, names = threading.Lock(), [0], [0], set()

    def reward(completion, **columns):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
            names.add(threading.current_thread() is threading.main_thread())
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return 0.5

    groups = collect(reward).groups
    assert {t.outcome_reward for group in groups for t in group.trajectories} == {0.5}
    assert most[0] > 1 and names == {False}


def test_an_async_reward_stays_in_the_event_loop(collect):
    async def reward(completion, **columns):
        return float(threading.current_thread() is threading.main_thread())

    assert {t.outcome_reward for group in collect(reward).groups for t in group.trajectories} == {1.0}


def test_a_reward_that_hangs_costs_its_trajectory_only_and_is_counted(collect):
    release, calls = threading.Event(), []

    def reward(completion, **columns):
        calls.append(1)
        if len(calls) == 3:
            release.wait(20.0)
        return 1.0

    collection = collect(reward, env_timeout_s=1.0)
    statuses = [t.status for group in collection.groups for t in group.trajectories]
    assert statuses.count(Status.ENV_ERROR) == 1 and statuses.count(Status.OK) == 15
    assert rollout_stats(collection)["rollout/threads_left"] == 1.0
    release.set()


def test_a_reward_that_exits_is_an_error_of_its_trajectory(collect):
    def reward(completion, **columns):
        raise SystemExit(3)

    groups = collect(reward).groups
    assert {t.status for group in groups for t in group.trajectories} == {Status.ENV_ERROR}
    assert "SystemExit" in str(groups[0].trajectories[0].error)
