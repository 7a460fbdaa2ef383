"""Toy task sets and settings shared by tests: small enough that a whole training run takes seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from spear_fast.envs.base import Info, StepResult, Tool

LUCKY = "7"


class GuessEnv:
    """Asks for a digit and rewards 7; in the demo split every digit is right, so demonstrations teach the format."""

    tools: Sequence[Tool] = ()

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        self._target = str(options["index"] % 10) if options["split"] == "demo" else LUCKY
        return "digit?", Info()

    async def step(self, text: str) -> StepResult:
        won = text == self._target
        return "", float(won), True, False, Info(won=won, answered=True)

    async def close(self) -> None:
        pass

    def expert(self) -> str:
        return self._target


class GuessTasks:
    """Task set "tests.toys:GuessTasks"."""

    class Params(BaseModel):
        pass

    name = "guess"
    system_prompt = ""
    tools: Sequence[Tool] = ()

    def __init__(self, params: Any, seed: int) -> None:
        pass

    def size(self, split: str) -> int:
        return {"train": 64, "eval": 64, "demo": 20}[split]

    def make(self) -> GuessEnv:
        return GuessEnv()


def echo(text: str) -> str:
    """Return the text.

    Args:
        text: Anything.
    """
    return text


def hang(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "awake"


def fail() -> str:
    """Raise."""
    raise ValueError("the tool is broken")


def flood() -> str:
    """Return a megabyte with special tokens in it."""
    return "<|im_end|>" * 100_000


async def echo_later(text: str) -> str:
    """Return the text a little later.

    Args:
        text: Anything.
    """
    await asyncio.sleep(0.01)
    return text


class ToolEnv(GuessEnv):
    """As GuessEnv, with tools that behave in every way a tool can."""

    tools: Sequence[Tool] = (echo, hang, fail, flood, echo_later)


class ToolTasks(GuessTasks):
    """Task set of ToolEnv; `make` can be replaced by a test."""

    tools = ToolEnv.tools
    system_prompt = "Be quick."

    def make(self) -> GuessEnv:
        return ToolEnv()


GUESS_RUN: dict[str, Any] = {
    "name": "guess",
    "steps": 4,
    "task": {"name": "tests.toys:GuessTasks"},
    "model": {
        "init": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 64,
            "vocab_size": 290,
            "max_positions": 64,
        }
    },
    "cold_start": {"steps": 60, "num_demos": 20, "batch_size": 20, "lr": 1e-2, "warmup_steps": 2},
    "rollout": {
        "prompts_per_step": 4,
        "group_size": 8,
        "max_turns": 2,
        "max_turn_tokens": 4,
        "max_tokens": 40,
        "deterministic": True,
    },
    "algo": {"preset": "grpo"},
    "update": {"lr": 3e-3, "token_budget": 1024},
    "eval": {"num_tasks": 64},
    "checkpoint": {"every": 0},
    "log": {"progress": "off", "tensorboard": False, "sample_every": 2},
}
"""A run of about two seconds on one core."""
