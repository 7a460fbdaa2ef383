"""Tool calls of a sampled message: find them in the text, and run them with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spear_fast.envs.base import Tool
from spear_fast.envs.tool_schema import ToolArgumentError, check_arguments
from spear_fast.rollout.timeouts import within

Outcome = tuple[Any, BaseException | None]
"""What a tool returned, and what it raised."""

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


class ToolTimeoutError(Exception):
    """A tool did not answer in time, retries included."""


@dataclass(frozen=True)
class ToolCall:
    """One call as the policy wrote it: `{"name": ..., "arguments": {...}}` between tool_call tags."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """Why the text could not be read as a call, for the policy to see."""


@dataclass(frozen=True)
class ToolResult:
    """What the policy reads back."""

    text: str
    valid: bool
    """Whether the call was understood and the tool did not raise."""


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Return the calls in a message, in order, in the Hermes format that Qwen models are trained on."""
    return [_parse_one(body) for body in _CALL.findall(text)]


def _parse_one(body: str) -> ToolCall:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "too large or too deep")
        return ToolCall("", {}, f"Error: the call is not valid JSON ({reason}).")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("", {}, 'Error: a call needs the form {"name": ..., "arguments": {...}}.')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], {}, "Error: arguments must be an object.")
    return ToolCall(call["name"], arguments)


async def run_tool(call: ToolCall, tools: Sequence[Tool], *, timeout_s: float, retries: int) -> ToolResult:
    """Run one call and return its result, or the error text that the policy shall read.

    Args:
        call: The parsed call.
        tools: What the environment offers, by function name.
        timeout_s: Limit of one attempt, in seconds.
        retries: Further attempts of an async tool after a timeout.

    Raises:
        ToolTimeoutError: No attempt finished in time.
    """
    if call.error is not None:
        return ToolResult(call.error, valid=False)
    tool = next((tool for tool in tools if tool.__name__ == call.name), None)
    if tool is None:
        names = ", ".join(tool.__name__ for tool in tools)
        return ToolResult(f"Error: there is no tool {call.name!r}; use one of: {names}.", valid=False)
    try:
        arguments = check_arguments(tool, call.arguments)
    except ToolArgumentError as error:
        return ToolResult(f"Error: {error}", valid=False)
    # A thread cannot be cancelled: a second attempt would run beside the first, on the same environment.
    attempt, attempts = (_guarded, retries + 1) if inspect.iscoroutinefunction(tool) else (_in_thread, 1)
    for _ in range(attempts):
        try:
            result, error = await within(attempt(tool, arguments), timeout_s)
        except TimeoutError:
            continue
        if error is not None:
            return ToolResult(f"Error: {error or type(error).__name__}", valid=False)
        return ToolResult(str(result), valid=True)
    raise ToolTimeoutError(f"tool {call.name!r} gave no answer within {timeout_s} s, {attempts} attempt(s)")


async def _guarded(tool: Tool, arguments: dict[str, Any]) -> Outcome:
    """Call an async tool; whatever it raises, `SystemExit` included, is returned beside the result."""
    try:
        return await tool(**arguments), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error


def _in_thread(tool: Tool, arguments: dict[str, Any]) -> asyncio.Future[Outcome]:
    """Run a sync tool in a daemon thread of its own: one that hangs can block neither a pool nor the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        try:
            outcome: Outcome = (tool(**arguments), None)
        except BaseException as error:
            outcome = (None, error)
        # The loop is gone when a tool outlives the run that gave up on it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, daemon=True).start()
    return future
