"""A workload of the step benchmark as a task set of this trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

from bench.steps.workloads import WORKLOADS, Script, World, reward_of
from spear_fast.envs.base import Info, StepResult, Tool
from spear_fast.rollout.tool_calls import parse_tool_calls


class ScriptTasks:
    """As many training tasks as the workload has prompts, so that each step takes all of them."""

    class Params(BaseModel):
        """Which workload, and the folder of the model whose tokenizer spells it."""

        model_config = ConfigDict(extra="forbid")
        size: str
        workload: str
        model: str

    name = "script"
    system_prompt = ""
    tools: Sequence[Tool] = ()
    """None are shown: the chat template lists no tools, and each environment has its own."""

    def __init__(self, params: Params, seed: int) -> None:
        del seed  # the workload has its own
        workload = WORKLOADS[params.size][params.workload]
        self.script = Script(workload, AutoTokenizer.from_pretrained(params.model))
        self._lookup: list[Tool] = [self.script.lookup()] if workload.kind == "tools" else []

    def size(self, split: str) -> int:
        """Return the number of prompts, for any split."""
        return len(self.script.prompts)

    def make(self) -> ScriptEnvironment:
        """Return an environment that has not begun."""
        return ScriptEnvironment(self.script, self._lookup)


class ScriptEnvironment:
    """Shows a prompt, runs the world in a game, and rewards the message without a call, which ends the episode."""

    def __init__(self, script: Script, tools: Sequence[Tool]) -> None:
        self.tools = tools
        self._script = script
        self._world = World(0)

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Start the task with the prompt's index."""
        del seed
        index = int(options["index"])
        self._world = World(index)
        messages: list[dict[str, Any]] = [dict(message) for message in self._script.prompts[index]]
        return messages[-1]["content"], {"messages": messages}

    async def step(self, text: str) -> StepResult:
        """Move in the world, or end with a reward."""
        calls = parse_tool_calls(text)
        if not calls:
            return "", reward_of(text), True, False, {"answered": True}
        return self._world.move(calls[0].arguments["move"]), 0.0, False, False, {}

    async def close(self) -> None:
        """Nothing was taken."""
