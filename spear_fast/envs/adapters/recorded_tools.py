"""Tools that note their calls, for rewards that read the whole conversation."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from ..base import Tool

Target = Callable[["Recording"], Callable[..., Any]]
"""The function to call for an episode."""


class _Result:
    """What the policy reads of one call."""

    text = "Error: the call did not end"

    def of(self, value: Any) -> Any:
        """Take the value that the tool returned, and return it."""
        self.text = str(value)
        return value


class Recording:
    """What the policy did in one episode, as messages: each tool call with its result, then its last message.

    The text that the policy wrote beside a call, and calls that named no tool or did not fit it, are not seen here.
    """

    def __init__(self, owner: Any = None) -> None:
        """`owner` is the object whose methods the tools are, if they are methods."""
        self.owner = owner
        self.messages: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._running = 0

    @property
    def is_busy(self) -> bool:
        """Whether a tool still runs, as one does that timed out."""
        return self._running > 0

    @contextmanager
    def call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[_Result]:
        """Note a call that is made inside, and the text of its result or of what it raises."""
        result = _Result()
        with self._lock:
            self._running += 1
        try:
            yield result
        except Exception as error:
            result.text = f"Error: {error or type(error).__name__}"
            raise
        finally:
            with self._lock:
                self._running -= 1
                self.messages += [
                    {"role": "assistant", "content": "", "tool_calls": [_tool_call(name, arguments)]},
                    {"role": "tool", "name": name, "content": result.text},
                ]


def recorded(name: str, function: Callable[..., Any], target: Target, is_method: bool) -> Callable[..., Any]:
    """Return a function that, bound to a `Recording`, is a tool with the name, signature and docstring of `function`.

    Made once for all episodes: `tool_schema` keeps what it found out about each function.

    Args:
        name: What the policy calls it.
        function: Plain, or as its class holds it.
        target: Returns what to call.
        is_method: Whether the first parameter of `function` is the object itself.
    """
    tool: Callable[..., Any]
    if inspect.iscoroutinefunction(function):

        async def call_async(recording: Recording, /, **arguments: Any) -> Any:
            with recording.call(name, arguments) as result:
                return result.of(await target(recording)(**arguments))

        tool = call_async
    else:

        def call(recording: Recording, /, **arguments: Any) -> Any:
            with recording.call(name, arguments) as result:
                return result.of(target(recording)(**arguments))

        tool = call
    described: Any = functools.update_wrapper(tool, function)
    described.__name__ = name
    if not is_method:
        signature = inspect.signature(function)
        first = inspect.Parameter("recording", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        described.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    return described


def bound(tools: Sequence[Callable[..., Any]], recording: Recording) -> list[Tool]:
    """Return the tools of one episode."""
    return [MethodType(tool, recording) for tool in tools]


def _tool_call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(dict(arguments), default=str))
    return {"type": "function", "function": {"name": name, "arguments": plain}}
