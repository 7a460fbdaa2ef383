"""Drives an environment as the rollout does: tool calls go to the tools, other messages to step."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from spear_fast.envs.base import Environment, Info, TaskSet
from spear_fast.envs.tool_schema import check_arguments

MAX_MESSAGES = 100


@dataclass
class Episode:
    """What happened in one episode, `infos` and `observations` from reset on."""

    env: Environment
    observations: list[str]
    infos: list[Info]
    rewards: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False

    @property
    def won(self) -> bool:
        return self.infos[-1].get("won", False)


Policy = Callable[[Any, Episode], str]


def call_tool(env: Environment, message: str) -> str | None:
    """Result of the tool call in `message`, or None if there is none."""
    call = re.search(r"<tool_call>(.*)</tool_call>", message)
    if call is None:
        return None
    request = json.loads(call[1])
    tool = {each.__name__: each for each in env.tools}[request["name"]]
    return tool(**check_arguments(tool, request["arguments"]))


async def play_async(tasks: TaskSet, split: str, index: int, policy: Policy, seed: int = 0) -> Episode:
    env = tasks.make()
    observation, info = await env.reset(seed=seed, options={"split": split, "index": index})
    episode = Episode(env, [observation], [info])
    while not (episode.terminated or episode.truncated):
        assert len(episode.messages) < MAX_MESSAGES
        message = policy(env, episode)
        episode.messages.append(message)
        result = call_tool(env, message)
        if result is not None:
            episode.observations.append(result)
            continue
        observation, reward, episode.terminated, episode.truncated, info = await env.step(message)
        episode.observations.append(observation)
        episode.rewards.append(reward)
        episode.infos.append(info)
    await env.close()
    return episode


@pytest.fixture
def play() -> Callable[..., Episode]:
    """`play(tasks, split, index, policy)` runs one episode; without a policy the expert plays."""

    def run(tasks: TaskSet, split: str, index: int, policy: Policy | None = None) -> Episode:
        return asyncio.run(play_async(tasks, split, index, policy or (lambda env, _: env.expert())))

    return run
