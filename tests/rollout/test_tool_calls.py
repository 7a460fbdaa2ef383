"""Tool calls: every malformed call and every misbehaving tool becomes text for the policy or a timeout."""

from __future__ import annotations

import asyncio
import time

import pytest

from spear_fast.rollout.tool_calls import ToolResult, ToolTimeoutError, parse_tool_calls, run_tool
from tests.toys import ToolEnv


def run(text: str, timeout_s: float = 5.0, retries: int = 0) -> ToolResult:
    (call,) = parse_tool_calls(text)
    return asyncio.run(run_tool(call, ToolEnv.tools, timeout_s=timeout_s, retries=retries))


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize("name", ["echo", "echo_later"])
def test_sync_and_async_tools_answer(name):
    assert run(call(name, '{"text": "hello"}')) == ToolResult("hello", valid=True)


def test_calls_are_found_in_order_and_an_open_one_counts():
    text = "a" + call("echo") + "b" + call("fail") + '<tool_call>{"name": "flood", "arguments": {}}'
    assert [each.name for each in parse_tool_calls(text)] == ["echo", "fail", "flood"]


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("<tool_call>{broken</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "needs the form"),
        ('<tool_call>{"name": 3}</tool_call>', "needs the form"),
        (call("echo", "[1]"), "must be an object"),
        (call("no_such"), "use one of: echo, hang, fail, flood, echo_later"),
        (call("echo"), "text"),
        (call("echo", '{"text": "a", "other": 1}'), "other"),
        (call("fail"), "the tool is broken"),
    ],
)
def test_wrong_calls_become_errors_the_policy_can_read(text, needle):
    result = run(text)
    assert not result.valid
    assert result.text.startswith("Error: ") and needle in result.text


def test_a_hanging_tool_times_out_after_its_retries_and_leaves_no_wait():
    started = time.monotonic()
    with pytest.raises(ToolTimeoutError, match=r"'hang' gave no answer within 0.05 s, 3 attempt"):
        run(call("hang", '{"seconds": 30}'), timeout_s=0.05, retries=2)
    assert time.monotonic() - started < 10
