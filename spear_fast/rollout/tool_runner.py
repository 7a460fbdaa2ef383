"""Runs tool calls: limits of time and of calls at once, retries, and text for whatever goes wrong."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from spear_fast.envs.base import Tool
from spear_fast.envs.threads import Threads
from spear_fast.envs.tool_schema import ToolArgumentError, check_arguments
from spear_fast.rollout.timeouts import within
from spear_fast.rollout.tool_calls import ToolCall

MAX_THREADS = 64
"""Calls of sync tools that run at once in one process."""

Outcome = tuple[Any, BaseException | None]
"""What a tool returned, and what it raised."""


class ToolTimeoutError(Exception):
    """A tool did not answer in time, retries included."""


@dataclass(frozen=True)
class ToolResult:
    """What the policy reads back."""

    text: str
    valid: bool
    """Whether the call was understood and the tool did not raise."""


class ToolRunner:
    """Runs the tool calls of many trajectories. A sync tool runs in a thread and never holds up the event loop."""

    def __init__(
        self, *, timeout_s: float, retries: int, timeouts_s: Mapping[str, float], concurrency: Mapping[str, int]
    ) -> None:
        """
        Args:
            timeout_s: Limit of one attempt, in seconds; waiting for a place does not count.
            retries: Further attempts of an async tool after a timeout.
            timeouts_s: Instead of `timeout_s`, by name.
            concurrency: Calls at once, by name; others are bounded by `MAX_THREADS` if they are sync.
        """
        self._timeout_s = timeout_s
        self._retries = retries
        self._timeouts_s = timeouts_s
        self._places = {name: asyncio.Semaphore(limit) for name, limit in concurrency.items()}
        self._threads = Threads(MAX_THREADS)

    async def run(self, calls: Sequence[ToolCall], tools: Sequence[Tool]) -> list[ToolResult]:
        """Run the calls of one message and return their results in the same order.

        A call begins when the one before has ended, since tools may share the state of their environment. Only
        neighbouring calls of async tools that are functions, not methods, run at once; a tool with state that is
        async should therefore be a method.

        Raises:
            ToolTimeoutError: No attempt of some call finished in time.
        """
        by_name = {tool.__name__: tool for tool in reversed(tools)}
        results: list[ToolResult] = []
        for is_free, neighbours in groupby(calls, key=lambda call: _is_free(by_name.get(call.name))):
            running = [self._run_one(call, by_name) for call in neighbours]
            results += await _together(running) if is_free else [await each for each in running]
        return results

    async def _run_one(self, call: ToolCall, by_name: Mapping[str, Tool]) -> ToolResult:
        """Run one call and return its result, or the error text that the policy shall read."""
        if call.error is not None:
            return ToolResult(call.error, valid=False)
        tool = by_name.get(call.name)
        if tool is None:
            return ToolResult(
                f"Error: there is no tool {call.name!r}; use one of: {', '.join(reversed(list(by_name)))}.", valid=False
            )
        try:
            arguments = check_arguments(tool, call.arguments)
        except ToolArgumentError as error:
            return ToolResult(f"Error: {error}", valid=False)
        async with self._places.get(call.name, nullcontext()):
            result, error = await self._attempts(tool, arguments)
        if error is not None:
            return ToolResult(f"Error: {error or type(error).__name__}", valid=False)
        return ToolResult(str(result), valid=True)

    async def _attempts(self, tool: Tool, arguments: dict[str, Any]) -> Outcome:
        name = tool.__name__
        timeout_s = self._timeouts_s.get(name, self._timeout_s)
        # A thread cannot be cancelled: a second attempt would run beside the first, on the same environment.
        attempts = self._retries + 1 if inspect.iscoroutinefunction(tool) else 1
        for _ in range(attempts):
            attempt = (
                _guarded(tool, arguments)
                if inspect.iscoroutinefunction(tool)
                else self._threads.run(functools.partial(tool, **arguments))
            )
            try:
                return await within(attempt, timeout_s)
            except TimeoutError:
                continue
        raise ToolTimeoutError(f"tool {name!r} gave no answer within {timeout_s} s, {attempts} attempt(s)")


def _is_free(tool: Tool | None) -> bool:
    """Whether calls of the tool may run beside each other."""
    return inspect.iscoroutinefunction(tool) and not inspect.ismethod(tool)


async def _together(running: Sequence[Coroutine[Any, Any, ToolResult]]) -> list[ToolResult]:
    """Await all; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in running]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _guarded(tool: Tool, arguments: dict[str, Any]) -> Outcome:
    """Call an async tool; whatever it raises, `SystemExit` included, is returned beside the result."""
    try:
        return await tool(**arguments), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
