"""Our conversations as verifiers' traces, which its rewards read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from spear_fast.errors import TaskError


def start_trace(task: Any, state: Any) -> Any:
    """Return the empty trace of an episode."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    seeded = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    trace = vf.Trace(task=seeded, agent=vf.AgentInfo(config=vf.AgentConfig()))
    trace.state = state  # set, not passed: what the tools change must be seen here
    return trace


def record_turns(trace: Any, prompt: Sequence[dict[str, Any]], messages: Sequence[dict[str, Any]]) -> None:
    """Add a conversation to `trace`: each message of the policy in `messages` as one sampled turn."""
    from verifiers.v1.graph import prepare_turn  # pyright: ignore[reportMissingImports]

    before = list(_converted(prompt))
    for message in _converted(messages):
        if message.role == "assistant":
            prepare_turn(trace, list(before)).commit(_response(message))
        before.append(message)


def content_text(message: Any) -> str:
    """Return the text of a message of verifiers. Raises TaskError if it has other parts than text."""
    if isinstance(message.content, str):
        return message.content
    parts = message.content or []
    if any(part.type != "text" for part in parts):
        raise TaskError("a prompt of the taskset holds an image; only text is supported")
    return "".join(part.text for part in parts)


def _response(message: Any) -> Any:
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    finish = "tool_calls" if message.tool_calls else "stop"
    return vf.Response(id="", created=0, model="policy", message=message, finish_reason=finish)


def _converted(messages: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Messages of ours as those of verifiers; a result follows its call."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage}
    call_id = ""
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            yield vf.ToolMessage(tool_call_id=call_id, content=message["content"], name=message["name"])
        elif message["role"] == "assistant":
            call_id = f"call_{number}"
            functions = [call["function"] for call in message.get("tool_calls", ())]
            calls = [
                vf.ToolCall(id=call_id, name=function["name"], arguments=json.dumps(function["arguments"]))
                for function in functions
            ]
            yield vf.AssistantMessage(content=message["content"], tool_calls=calls or None)
        else:
            yield kinds[message["role"]](content=message["content"])
