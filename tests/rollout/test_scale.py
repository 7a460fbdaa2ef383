"""512 trajectories at once whose tools are slow, raise or hang: all of them end, each with a status of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.base import Info, StepResult, Tool
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Status, Task
from tests.rollout.test_episode import LIMITS

COUNT = 512
KINDS = ("slow", "raises", "hangs", "slow_thread", "exits", "breaks", "never_steps", "hangs_thread")
"""What the tools of a trajectory do; a trajectory's kind is its number modulo their number, but for the last."""
NUM_HANGING_THREADS = 8
HANG_TIMEOUT_S = 0.5


def kind_of(number: int) -> str:
    """The kind of a trajectory: threads that hang are few, since each stays until the test ends."""
    kind = KINDS[number % len(KINDS)]
    return "slow" if kind == "hangs_thread" and number >= NUM_HANGING_THREADS * len(KINDS) else kind


class Shared:
    """What the trajectories have in common: how many wait in a slow tool, and the end of those that hang."""

    def __init__(self) -> None:
        self.expected = sum(kind_of(number) == "slow" for number in range(COUNT))
        self.inside = 0
        self.all_inside = asyncio.Event()
        self.closed = 0
        self.end = threading.Event()


class ScaleEnv:
    """Trajectory `options["index"]`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.tools: Sequence[Tool] = (self.work, self.hang)

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        kind = kind_of(options["index"])
        self._kind = kind
        if kind in ("slow_thread", "hangs_thread"):
            self.tools = self._sync_tools()
        return "work", Info()

    async def work(self) -> str:
        """Work."""
        if self._kind == "slow":
            # Only where all of these are in flight together does any of them get an answer.
            self._shared.inside += 1
            if self._shared.inside == self._shared.expected:
                self._shared.all_inside.set()
            await self._shared.all_inside.wait()
        if self._kind == "raises":
            raise ValueError("broken tool")
        if self._kind == "exits":
            raise SystemExit(3)
        return "worked"

    async def hang(self) -> str:
        """Never return."""
        await asyncio.Event().wait()
        return "never"

    def _sync_tools(self) -> tuple[Any, ...]:
        def work() -> str:
            """Work."""
            time.sleep(0.001)
            return "worked"

        def hang() -> str:
            """Return when the test is over."""
            self._shared.end.wait(60.0)
            return "late"

        return work, hang

    async def step(self, text: str) -> StepResult:
        if self._kind == "breaks":
            raise RuntimeError("broken environment")
        if self._kind == "never_steps":
            await asyncio.Event().wait()
        return "", 1.0, True, False, Info(won=True)

    async def close(self) -> None:
        self._shared.closed += 1


class ScaleTasks:
    name = "scale"
    system_prompt = ""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.tools: Sequence[Tool] = ScaleEnv(shared).tools

    def size(self, split: str) -> int:
        return COUNT

    def make(self) -> ScaleEnv:
        return ScaleEnv(self._shared)


def test_512_trajectories_end_whatever_their_tools_do():
    shared = Shared()
    tasks = ScaleTasks(shared)
    calls = {name: f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("work", "hang")}
    tokenizer = train_tokenizer([*calls.values(), "worked done"] * 9, 320)
    chat = Chat(tokenizer, [tool_schema(tool) for tool in tasks.tools])
    (mark,) = tokenizer.encode("<tool_call>", add_special_tokens=False)

    def reply(request: GenerationRequest) -> list[int]:
        if mark in request.prompt:
            return chat.message("done")
        return chat.message(calls["hang" if kind_of(request.uid).startswith("hangs") else "work"])

    # What is not meant to hang has a minute: this machine may be busy. Environments have the short limit too, but
    # what answers at once is never late.
    limits = replace(
        LIMITS, max_tokens=1000, tool_timeout_s=60.0, tool_timeouts_s={"hang": HANG_TIMEOUT_S}, env_timeout_s=2.0
    )
    collector = Collector(tasks, ScriptedEngine(reply), chat, limits, max_concurrent=COUNT, seed=0)
    try:
        problems = [Task("scale", "train", number, seed=0) for number in range(COUNT)]
        collection = collector.collect(problems, 1, tag="train/0")
    finally:
        shared.end.set()
        collector.close()
    trajectories = [group.trajectories[0] for group in collection.groups]
    assert [one.task.index for one in trajectories] == list(range(COUNT))
    found = Counter((kind_of(one.task.index), one.status, one.success) for one in trajectories)
    kinds = Counter(kind_of(number) for number in range(COUNT))
    fine, late, broken = (Status.OK, True), (Status.TOOL_TIMEOUT, False), (Status.ENV_ERROR, False)
    ends = {
        "slow": fine, "raises": fine, "slow_thread": fine, "exits": fine, "hangs": late, "hangs_thread": late,
        "breaks": broken, "never_steps": broken,
    }  # fmt: skip
    assert found == {(kind, *ends[kind]): count for kind, count in kinds.items()}
    assert all((one.error is None) == one.status.usable for one in trajectories)
    read = {kind_of(one.task.index): one.messages[2]["content"] for one in trajectories if one.status.usable}
    assert "broken tool" in read["raises"] and read["slow"] == read["slow_thread"] == "worked"
    assert shared.closed == COUNT
    assert collection.threads_left == NUM_HANGING_THREADS
