"""The collector without a model: episodes of a text game whose replies come from a script."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.common import cases
from spear_fast.data.chat import Chat
from spear_fast.data.prompts import make_task
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.registry import make_task_set
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.demos import demonstrate, demonstration_text
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.scripted_engine import ScriptedEngine

TASK, TURNS, TURN_TOKENS, GROUP = "treasure", 8, 32, 8
LIMITS = EpisodeLimits(
    max_turns=TURNS,
    max_turn_tokens=TURN_TOKENS,
    max_tokens=4096,
    temperature=1.0,
    tool_timeout_s=30.0,
    tool_retries=0,
    env_timeout_s=60.0,
    max_observation_chars=4096,
)


def collector_row(episodes: int, concurrent: int, repeats: int) -> cases.Row:
    """Collect episodes of random replies, all turns used: chat, environment, masks and bookkeeping, no model."""
    tasks = make_task_set(TASK, {}, 0)
    demos = demonstrate(tasks, 64, max_turns=32, seed=0)
    chat = Chat(train_tokenizer(map(demonstration_text, demos), 512), [])
    vocab_size = len(chat.tokenizer)

    def reply(request: GenerationRequest) -> list[int]:
        return np.random.default_rng(request.seed).integers(0, vocab_size, TURN_TOKENS).tolist()

    collector = Collector(tasks, ScriptedEngine(reply), chat, LIMITS, max_concurrent=concurrent, seed=0)
    problems = [make_task(tasks.name, "train", index, 0) for index in range(-(-episodes // GROUP))]
    times, tokens = [], 0
    try:
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            groups = collector.collect(problems, GROUP, tag=f"train/{repeat}").groups
            times.append(time.perf_counter() - started)
            trajectories = [one for group in groups for one in group.trajectories]
            failed = next((one for one in trajectories if not one.status.usable), None)
            if failed is not None:
                raise ValueError(f"an episode ended as {failed.status.value}: {failed.error}")
            tokens = sum(one.num_action_tokens for one in trajectories)
    finally:
        collector.close()
    return summary(times[1:], tokens, len(problems) * GROUP)


def summary(times: list[float], tokens: int, episodes: int) -> dict[str, Any]:
    """The row of these times: rates of sampled tokens and of episodes."""
    row = cases.measured(times, tokens=tokens, episodes=episodes)
    return row | {"tokens_per_s": tokens / row["median_s"], "episodes_per_s": episodes / row["median_s"]}
