"""Trajectories whose tools are slow, fail or hang by plan: what they do, and how long they must take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.base import Info, StepResult, Tool
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.seeds import derive_seed

CALL_TEXT = "<tool_call>" + json.dumps({"name": "work", "arguments": {}}) + "</tool_call>"
ANSWER_TEXT = "done"
LONGEST_SHARE = 0.8
"""Slow calls end before this share of the time limit, so that the plan alone decides which calls time out."""


@dataclass(frozen=True)
class Load:
    """How many trajectories, and what their tools do. Times in seconds."""

    trajectories: int
    turns: int
    """Tool calls of a trajectory, one a message; the message after them is the answer."""
    median_s: float
    """Median time of a call; times are log-normal."""
    sigma: float
    """Standard deviation of the logarithm of a time."""
    fail: float
    """Share of calls that raise at their end; the policy reads the error and goes on."""
    hang: float
    """Share of calls that never return; the time limit ends the trajectory."""
    timeout_s: float
    """Time limit of a call."""

    def plan(self, seed: int) -> list[list[Call]]:
        """Return the calls of each trajectory, up to the one that hangs; `seed` decides them."""
        return [self._calls(derive_seed(seed, "tools", number)) for number in range(self.trajectories)]

    def _calls(self, seed: int) -> list[Call]:
        generator = np.random.default_rng(seed)
        calls = []
        for _ in range(self.turns):
            seconds = float(self.median_s * np.exp(self.sigma * generator.standard_normal()))
            chance = generator.random()
            if chance < self.hang:
                return [*calls, Call("hang", self.timeout_s)]
            end = "fail" if chance < self.hang + self.fail else "return"
            calls.append(Call(end, min(seconds, LONGEST_SHARE * self.timeout_s)))
        return calls


@dataclass(frozen=True)
class Call:
    """One call: how it ends, and after how many seconds (for one that hangs, the time limit)."""

    end: Literal["return", "fail", "hang"]
    seconds: float


Plan = Sequence[Sequence[Call]]


def longest_trajectory(plan: Plan) -> float:
    """Return the seconds below which no collection can stay: those of the slowest trajectory."""
    return max(sum(call.seconds for call in calls) for calls in plan)


def slowest_of_each_turn(plan: Plan) -> float:
    """Return the seconds below which no lock-step loop can stay: the slowest call of each turn, summed."""
    turns = range(max(len(calls) for calls in plan))
    return sum(max(calls[turn].seconds for calls in plan if turn < len(calls)) for turn in turns)


def hanging(plan: Plan) -> list[int]:
    """Return the numbers of the trajectories that a time limit must end."""
    return [number for number, calls in enumerate(plan) if calls[-1].end == "hang"]


class AgentEnv:
    """Trajectory `options["index"]` of the plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls: list[Call] = []
        self.tools: Sequence[Tool] = (self.work,)

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Begin."""
        self._calls = list(self._plan[options["index"]])
        return "work, then say done", Info()

    async def work(self) -> str:
        """Do the next thing that is planned."""
        call = self._calls.pop(0)
        if call.end == "hang":
            await asyncio.Event().wait()
        await asyncio.sleep(call.seconds)
        if call.end == "fail":
            raise ValueError("the tool failed")
        return "worked"

    async def step(self, text: str) -> StepResult:
        """Take the answer."""
        won = text == ANSWER_TEXT and not self._calls
        return "", float(won), True, False, Info(won=won)

    async def close(self) -> None:
        """Nothing is held."""


class AgentTasks:
    """A task set of one plan."""

    name = "agents"
    system_prompt = ""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.tools: Sequence[Tool] = (AgentEnv(plan).work,)

    def size(self, split: str) -> int:
        """Return the number of trajectories, whatever the split."""
        return len(self._plan)

    def make(self) -> AgentEnv:
        """Return a fresh environment."""
        return AgentEnv(self._plan)


def make_chat(tasks: AgentTasks) -> Chat:
    """Return a chat with a tokenizer that can write the script."""
    tokenizer = train_tokenizer([CALL_TEXT, ANSWER_TEXT, "worked"] * 9, 320)
    return Chat(tokenizer, [tool_schema(tool) for tool in tasks.tools])


def scripted_engine(chat: Chat, turns: int) -> ScriptedEngine:
    """Return an engine that calls the tool `turns` times in each conversation and then answers, at once."""
    (mark,) = chat.tokenizer.encode("<tool_call>", add_special_tokens=False)
    call, answer = chat.message(CALL_TEXT), chat.message(ANSWER_TEXT)

    def reply(request: GenerationRequest) -> list[int]:
        return call if request.prompt.count(mark) < turns else answer

    return ScriptedEngine(reply)
