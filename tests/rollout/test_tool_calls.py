"""Tool calls: every malformed call and every misbehaving tool becomes text for the policy or a timeout."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from spear_fast.envs.base import Tool
from spear_fast.rollout.tool_calls import ToolCall, parse_tool_calls
from spear_fast.rollout.tool_runner import ToolResult, ToolRunner, ToolTimeoutError
from tests.toys import ToolEnv


def run(text: str, timeout_s: float = 5.0, retries: int = 0) -> ToolResult:
    (call,) = parse_tool_calls(text)
    return asyncio.run(run_tool(call, ToolEnv.tools, timeout_s=timeout_s, retries=retries))


async def run_tool(call: ToolCall, tools: Sequence[Tool], timeout_s: float, retries: int) -> ToolResult:
    runner = ToolRunner(timeout_s=timeout_s, retries=retries, timeouts_s={}, concurrency={})
    (result,) = await runner.run([call], tools)
    return result


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


def test_a_hanging_thread_is_given_up_and_never_run_twice():
    before = threading.active_count()
    with pytest.raises(ToolTimeoutError, match=r"'hang' gave no answer within 0.05 s, 1 attempt"):
        run(call("hang", '{"seconds": 1}'), timeout_s=0.05, retries=2)
    assert threading.active_count() <= before + 1


def test_an_async_tool_is_cancelled_and_tried_again():
    attempts = []

    async def slow_at_first() -> str:
        """Answer at the second attempt."""
        attempts.append(1)
        await asyncio.sleep(30 if len(attempts) == 1 else 0)
        return "done"

    (each,) = parse_tool_calls(call("slow_at_first"))
    result = asyncio.run(run_tool(each, [slow_at_first], timeout_s=0.05, retries=1))
    assert result == ToolResult("done", valid=True) and len(attempts) == 2


@pytest.mark.parametrize("error", [SystemExit(1), StopIteration(), TimeoutError("server"), RecursionError("deep")])
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_tool_raises_is_an_error_the_policy_reads(error, is_async):
    def broken() -> str:
        """Raise."""
        raise error

    async def broken_async() -> str:
        """Raise."""
        raise error

    tool = broken_async if is_async else broken
    (each,) = parse_tool_calls(call(tool.__name__))
    result = asyncio.run(run_tool(each, [tool], timeout_s=5.0, retries=0))
    assert not result.valid and result.text.startswith("Error: ")


def test_an_answer_that_came_while_the_loop_was_busy_counts():
    async def run_busy() -> ToolResult:
        (each,) = parse_tool_calls(call("hang", '{"seconds": 0.05}'))
        task = asyncio.ensure_future(run_tool(each, ToolEnv.tools, timeout_s=0.2, retries=0))
        await asyncio.sleep(0)
        time.sleep(0.5)  # a long forward pass
        return await task

    assert asyncio.run(run_busy()) == ToolResult("awake", valid=True)


@pytest.mark.parametrize("body", ['{"name": "echo", "arguments": {"text": ' + "9" * 5000 + "}}", "[" * 200_000])
def test_hostile_json_is_a_wrong_call(body):
    assert "not valid JSON" in run(f"<tool_call>{body}</tool_call>").text
