"""Tool calls of a sampled message: find them in the text, and run them with a time limit."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spear_fast.envs.base import Tool
from spear_fast.envs.tool_schema import ToolArgumentError, check_arguments

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
    except json.JSONDecodeError as error:
        return ToolCall("", {}, f"Error: the call is not valid JSON ({error.msg}).")
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
        retries: Further attempts after a timeout.

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
    for _ in range(retries + 1):
        try:
            return ToolResult(str(await call_with_timeout(tool, arguments, timeout_s)), valid=True)
        except TimeoutError:
            continue
        except Exception as error:
            return ToolResult(f"Error: {error}", valid=False)
    raise ToolTimeoutError(f"tool {call.name!r} gave no answer within {timeout_s} s, {retries + 1} attempt(s)")


async def call_with_timeout(function: Callable[..., Any], arguments: dict[str, Any], timeout_s: float) -> Any:
    """Call a sync or async function; raise TimeoutError after `timeout_s` seconds.

    A sync function runs in a daemon thread of its own: one that hangs can block neither a pool nor the exit.
    """
    if inspect.iscoroutinefunction(function):
        return await asyncio.wait_for(function(**arguments), timeout_s)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function(**arguments)
        except TimeoutError as error:
            failure = RuntimeError(f"timed out inside the tool: {error}")
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wait_for(future, timeout_s)
