"""The blocks of docs/environments.md, and episodes that a script plays as the rollout does."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from spear_fast.data.prompts import make_task
from spear_fast.envs.base import TaskSet
from spear_fast.envs.registry import make_task_set
from spear_fast.rollout.demos import LIMITS, _Utf8Chat
from spear_fast.rollout.episode import Episode
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Trajectory

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (file|run): (\S+) -->\n)?```(\w+)\n(.*?)```", PAGE, re.DOTALL)
CONFIGS = {name: yaml.safe_load(text) for mark, name, _, text in BLOCKS if mark == "run"}
ELSEWHERE = {"count_server", "capitals"}
"""What tests/adapters runs, in the environment that these need."""

Policy = Callable[[list[dict[str, Any]]], str]
"""The message of the policy, given the conversation so far."""


def write_files(folder: Path) -> None:
    """Write the files that the page shows."""
    for mark, name, _, text in BLOCKS:
        if mark == "file":
            (folder / name).write_text(text, encoding="utf-8")


def task_set(name: str, **params: Any) -> TaskSet:
    """The task set that a configuration of the page names, in the current folder."""
    task = CONFIGS[name]["task"]
    return make_task_set(task["name"], {**task.get("params", {}), **params}, seed=0)


async def play_async(tasks: TaskSet, policy: Policy, split: str = "train", index: int = 0, **limits: Any) -> Trajectory:
    trajectory = Trajectory(make_task(tasks.name, split, index, 0), group_id=0, sample=0, uid=0, version=0)

    def reply(_: object) -> list[int]:
        return [*policy(trajectory.messages).encode(), _Utf8Chat.end_of_turn]

    rules = replace(LIMITS, **{"max_turns": 20, **limits})
    return await Episode(trajectory, tasks, ScriptedEngine(reply), _Utf8Chat(), rules, seed=0).run()


def play(tasks: TaskSet, policy: Policy, split: str = "train", index: int = 0, **limits: Any) -> Trajectory:
    """Play one episode."""
    return asyncio.run(play_async(tasks, policy, split, index, **limits))


def call(name: str, /, **arguments: Any) -> str:
    """A message that calls a tool."""
    request = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{request}</tool_call>"
