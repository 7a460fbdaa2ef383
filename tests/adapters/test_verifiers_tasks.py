"""Tasksets of the real verifiers, played through the adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spear_fast.envs.registry import make_task_set
from spear_fast.errors import ConfigError, TaskError
from tests.environments_page import call, play, task_set

Messages = list[dict[str, Any]]

HEAD = """
import verifiers.v1 as vf
class Row(vf.TaskData):
    answer: str = ""
class Count(vf.State):
    calls: int = 0
"""
SET = """
class Set(vf.Taskset[T, vf.TasksetConfig]):
    def load(self):
        for number in range(4):
            said = vf.UserMessage(content=f"Say {number}.")
            yield T(Row(prompt=[said], system_prompt="Be brief.", answer=str(number)), self.config.task)
"""
STATEFUL = (
    HEAD
    + """
class Box(vf.Toolset[vf.ToolsetConfig, Count]):
    async def setup_task(self, task):
        self.answer = task.answer
    @vf.tool(name="peek")
    def look(self, times: int = 1) -> str:
        '''Look into the box.

        Args:
            times: How often.
        '''
        self.state.calls += times
        return self.answer
class T(vf.Task[Row, Count]):
    async def setup(self, trace, runtime):
        trace.info["started"] = True
    @classmethod
    def toolsets(cls, config):
        return [Box(vf.ToolsetConfig())]
    @vf.reward(weight=0.5)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)
    @vf.reward(weight=0.25)
    async def looked(self, trace: vf.Trace) -> float:
        assert trace.info["started"] and trace.num_turns == len(trace.tool_messages) + 1
        calls = [call.name for message in trace.assistant_messages for call in message.tool_calls or []]
        assert calls == ["box_peek"] * len(trace.tool_messages)
        return float(trace.state.calls)
"""
    + SET
)


def answer(messages: Messages) -> str:
    if messages[-1]["role"] == "tool":
        return messages[-1]["content"]
    return call("capital", country=re.findall(r"of (\w+)\?", messages[-1]["content"])[0])


def test_the_page_is_played_and_won() -> None:
    tasks = task_set("capitals")
    assert [tasks.size(split) for split in ("train", "eval")] == [4, 2]
    for split in ("train", "eval"):
        won = play(tasks, answer, split)
        assert (won.error, won.success, won.num_valid_tool_calls) == (None, True, 1)
    assert not play(tasks, lambda _: "Atlantis").success


def test_tools_and_rewards_share_the_state_of_one_episode(tmp_path: Path) -> None:
    (tmp_path / "stateful.py").write_text(STATEFUL)
    tasks = make_task_set("verifiers", {"taskset": "stateful:Set", "num_eval": 1, "success_reward": 1.0}, 0)
    assert [tool.__name__ for tool in tasks.tools] == ["box_peek"]

    def look_twice(messages: Messages) -> str:
        return messages[-1]["content"] if messages[-1]["role"] == "tool" else call("box_peek", times=2)

    for _ in range(2):  # a second episode starts from no calls
        played = play(tasks, look_twice, index=1)
        assert (played.error, played.outcome_reward, played.success) == (None, 0.5 + 2 * 0.25, True)
    assert [message["content"] for message in played.messages[:2]] == ["Be brief.", "Say 2."]
    assert play(tasks, lambda _: "2", index=1).outcome_reward == 0.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    NEEDS_CONTAINER = True\n", "needs a container"),
        ("    @vf.stop\n    async def over(self, trace: vf.Trace) -> bool:\n        return True\n", "hook over"),
        (
            "    @vf.reward\n    async def ran(self, trace, runtime) -> float:\n        return 1.0\n",
            "ran .* needs a runtime",
        ),
    ],
)
def test_what_needs_verifiers_own_rollout_is_refused(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "refused.py").write_text(f"{HEAD}\nclass T(vf.Task[Row]):\n{body}{SET}")
    with pytest.raises(ConfigError, match=message):
        make_task_set("verifiers", {"taskset": "refused:Set", "num_eval": 1}, 0)


def test_use_of_a_runtime_is_an_error_of_the_trajectory(tmp_path: Path) -> None:
    body = "    async def setup(self, trace, runtime):\n        await runtime.run(['ls'], {})\n"
    (tmp_path / "runs.py").write_text(f"{HEAD}\nclass T(vf.Task[Row]):\n{body}{SET}")
    tasks = make_task_set("verifiers", {"taskset": "runs:Set", "num_eval": 1}, 0)
    assert "runtime.run" in str(play(tasks, lambda _: "").error)


def test_tasks_in_both_splits_are_refused(tmp_path: Path) -> None:
    equal = SET.replace("{number}", "it").replace("str(number)", '""')
    (tmp_path / "twice.py").write_text(f"{HEAD}\nclass T(vf.Task[Row]):\n    pass\n{equal}")
    with pytest.raises(TaskError, match="3 tasks of twice:Set are both"):
        make_task_set("verifiers", {"taskset": "twice:Set", "num_eval": 1}, 0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"taskset": "no-such-taskset"}, "cannot be loaded"),
        ({"taskset": "capitals:Nothing"}, "has no function or class 'Nothing'"),
        ({"taskset": "capitals:Capitals", "num_eval": 6}, "leaves no task for training"),
        ({"taskset": "capitals:Capitals", "config": {"colour": 1}}, "cannot be loaded.*colour"),
    ],
)
def test_what_does_not_fit_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_task_set("verifiers", params, 0)
