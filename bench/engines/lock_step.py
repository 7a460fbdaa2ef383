"""A rollout loop in lock step: all trajectories speak, then all tools run, and the next turn waits for the slowest."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from spear_fast.data.chat import Chat
from spear_fast.envs.base import Environment, TaskSet
from spear_fast.rollout.engine import Engine, GenerationRequest
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.tool_calls import parse_tool_calls
from spear_fast.rollout.tool_runner import ToolRunner, ToolTimeoutError


@dataclass
class _Member:
    """One trajectory of the batch."""

    number: int
    environment: Environment
    tokens: list[int]
    won: bool = False
    timed_out: bool = False
    over: bool = False


async def lock_step(tasks: TaskSet, engine: Engine, chat: Chat, limits: EpisodeLimits, count: int) -> list[Any]:
    """Play tasks 0 to `count` - 1 turn by turn and return for each True if won, False if not, None if a tool timed out.

    The tools of one turn run all at once, which is more than loops do that call them one after another.
    """
    runner = limits.tool_runner()
    members = [await _begin(tasks, chat, number) for number in range(count)]
    for turn in range(limits.max_turns):
        active = [member for member in members if not member.over]
        if not active:
            break
        texts = await asyncio.gather(*(_speak(member, engine, chat, limits, turn) for member in active))
        answers = zip(active, texts, strict=True)
        await asyncio.gather(*(_respond(member, text, chat, runner) for member, text in answers))
    return [None if member.timed_out else member.won for member in members]


async def _begin(tasks: TaskSet, chat: Chat, number: int) -> _Member:
    environment = tasks.make()
    text, _ = await environment.reset(seed=0, options={"split": "train", "index": number})
    return _Member(number, environment, list(chat.prompt([{"role": "user", "content": text}])))


async def _speak(member: _Member, engine: Engine, chat: Chat, limits: EpisodeLimits, turn: int) -> str:
    completion = await engine.generate(
        GenerationRequest(
            uid=member.number,
            prompt=list(member.tokens),
            max_tokens=limits.max_turn_tokens,
            temperature=limits.temperature,
            stop_ids=chat.stop_ids,
            seed=turn,
        )
    )
    member.tokens += completion.tokens
    return chat.decode(completion.tokens)[0]


async def _respond(member: _Member, text: str, chat: Chat, runner: ToolRunner) -> None:
    if "<tool_call>" not in text:
        _, _, _, _, info = await member.environment.step(text)
        member.won, member.over = info.get("won", False), True
        return
    try:
        results = await runner.run(parse_tool_calls(text), member.environment.tools)
    except ToolTimeoutError:
        member.timed_out = member.over = True
        return
    replies = [{"role": "tool", "content": result.text} for result in results]
    member.tokens += chat.continuation(replies, member.tokens[-1] == chat.end_of_turn)
