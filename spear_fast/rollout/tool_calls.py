"""Tool calls of a sampled message, as they are found in its text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call as the policy wrote it: `{"name": ..., "arguments": {...}}` between tool_call tags."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """Why the text could not be read as a call, for the policy to see."""


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
