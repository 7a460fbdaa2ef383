"""Demonstrations as a JSONL file: one conversation a line, in the shape that TRL's SFTTrainer takes too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spear_fast.envs.base import TaskSet, Tool
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import TaskError
from spear_fast.rollout.demos import Messages, is_learned
from spear_fast.types import Task

ROLES = ("system", "user", "assistant", "tool")
_READ = ("role", "content", "tool_calls", "reasoning_content", "weight")
_OF_NO_USE = ("name", "tool_call_id")
"""Keys of messages that rollouts do not have either."""


def demo_record(tasks: TaskSet, task: Task, messages: Messages, seed: int) -> dict[str, Any]:
    """Return what is written for a demonstration of `task`; `seed` is that of the task set and all its tasks."""
    record: dict[str, Any] = {"messages": messages}
    if tasks.tools:
        record["tools"] = [tool_schema(tool) for tool in tasks.tools]
    place = {"name": task.name, "split": task.split, "index": task.index, "seed": seed}
    return {**record, "task": place, "success": True}


def write_demos(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as lines while they come, and return their number; the file appears whole or not at all.

    Raises:
        TaskError: The file cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        with aside.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise TaskError(f"cannot write demonstrations to {path}: {error}; choose another place") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return count


def read_demos(path: Path, tools: Sequence[Tool]) -> list[Messages]:
    """Return the conversations of a file, as rollouts have them: each message with `role` and `content`.

    A line is `{"messages": [...]}`. Of other keys only `tools` is looked at: it must name the task set's `tools`, which
    the policy will be shown. Calls in `tool_calls` are put into the text in Hermes' format and `reasoning_content`
    between think tags, for this is how a policy writes them here. An assistant's message with `weight` 0 is context,
    e.g. of a few-shot prompt, and keeps that key.

    Raises:
        TaskError: The file cannot be read or holds no demonstration; naming line and field, a line is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TaskError(f"demonstrations {path} cannot be read: {error}; correct the path") from error
    expected = sorted(tool_schema(tool)["function"]["name"] for tool in tools)
    demos = [
        _demonstration(line, f"{path}, line {number}", expected)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not demos:
        raise TaskError(f"demonstrations {path}: the file is empty; give one conversation a line")
    return demos


def _demonstration(line: bytes, place: str, tool_names: list[str]) -> Messages:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{place}: not JSON ({error}); write one object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise TaskError(f"{place}: field 'messages' must be a list of messages; the line has {found or 'nothing'}")
    _check_tools(record.get("tools"), place, tool_names)
    messages = [_message(message, f"{place}: messages[{i}]") for i, message in enumerate(record["messages"])]
    _check_order(messages, place)
    return messages


def _check_tools(tools: Any, place: str, expected: list[str]) -> None:
    """Raise unless the line was made with the tools of the task set, or does not say."""
    if tools is None:
        return
    try:
        names = sorted(tool["function"]["name"] for tool in tools)
    except (TypeError, KeyError) as error:
        raise TaskError(f"{place}: field 'tools' must be a list of OpenAI function schemas; mend or drop it") from error
    if names != expected:
        raise TaskError(
            f"{place}: field 'tools' has {', '.join(names) or 'none'}, but the task set shows the policy "
            f"{', '.join(expected) or 'none'}; use demonstrations of this task, or drop the field"
        )


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise TaskError(f"{place}.role must be one of {', '.join(ROLES)}")
    unknown = [key for key, value in message.items() if value is not None and key not in (*_READ, *_OF_NO_USE)]
    if unknown:
        raise TaskError(f"{place}.{unknown[0]}: unknown field; known are {', '.join((*_READ, *_OF_NO_USE))}")
    said = {key: message[key] for key in ("tool_calls", "reasoning_content") if message.get(key)}
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise TaskError(f"{place}.weight must be 1, to learn the message, or 0, to show it only; it is {weight!r}")
    content = message.get("content")
    if content is None and said:
        content = ""
    if not isinstance(content, str):
        raise TaskError(f"{place}.content must be text, not {type(content).__name__}")
    if (said or weight is not None) and message["role"] != "assistant":
        raise TaskError(f"{place}.{next(iter(said), 'weight')}: only an assistant's message may have it")
    thought = said.get("reasoning_content", "")
    if not isinstance(thought, str):
        raise TaskError(f"{place}.reasoning_content must be text, not {type(thought).__name__}")
    parts = [f"<think>\n{thought}\n</think>"] * bool(thought) + [content] * bool(content)
    content = "\n".join([*parts, *_calls(said.get("tool_calls", []), place)])
    return {"role": message["role"], "content": content, **({"weight": 0} if weight == 0 else {})}


def _calls(calls: Any, place: str) -> Iterator[str]:
    """Yield each call as Qwen's chat templates write it."""
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        where = f"{place}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TaskError(f'{where} must be of the form {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            raise TaskError(f"{where}.function.arguments is not JSON ({error})") from error
        if not isinstance(arguments, dict):
            raise TaskError(f"{where}.function.arguments must be an object, not {type(arguments).__name__}")
        text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        yield f"<tool_call>\n{text}\n</tool_call>"


def _check_order(messages: Messages, place: str) -> None:
    """Raise unless the conversation could be a rollout's: an opening, then the assistant and others in turn."""
    roles = [message["role"] for message in messages]
    if not any(is_learned(message) for message in messages):
        raise TaskError(f"{place}: messages has no assistant's message of weight 1, so there is nothing to learn")
    for index, role in enumerate(roles):
        if role == "assistant" and (index == 0 or roles[index - 1] in ("assistant", "system")):
            before = f"after the {roles[index - 1]}'s" if index else "first"
            raise TaskError(
                f"{place}: messages[{index}].role: an assistant's message cannot stand {before}; a user's or a tool's "
                "message must come between"
            )
        if role == "system" and index > 0:
            raise TaskError(f"{place}: messages[{index}].role: a system message can only be the first")
