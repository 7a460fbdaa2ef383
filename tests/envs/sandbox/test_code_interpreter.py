"""The tool's text for every kind of end, fences around the code, and the parameters' own checks."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from spear_fast.envs.sandbox.base import RunResult
from spear_fast.envs.sandbox.choose import SandboxParams
from spear_fast.envs.sandbox.tool import EMPTY_NOTE, ERROR_HINT, CodeInterpreter, shown, unfenced
from spear_fast.envs.tool_schema import tool_schema


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (RunResult("Success", "Finished", 0, " 4\n", "", 0.1), "4"),
        (RunResult("Success", "Finished", 0, "4\n", "a warning\n", 0.1), "4"),
        (RunResult("Success", "Finished", 0, "\n", "", 0.1), EMPTY_NOTE),
        (
            RunResult("Failed", "Finished", 1, "half\n", "Traceback\n  at 1\n\nNameError: x\n", 0.1),
            f"at 1\nNameError: x\n{ERROR_HINT}",
        ),
        (RunResult("Failed", "Finished", -11, "", "", 0.1, "Killed by SIGSEGV."), f"Killed by SIGSEGV.\n{ERROR_HINT}"),
        (RunResult("Failed", "Finished", 7, "", "", 0.1), f"It ended with code 7.\n{ERROR_HINT}"),
        (
            RunResult("Failed", "TimeLimitExceeded", None, "1\n", "", 30.0),
            "1\nThe code was stopped after 30 s; make it faster.",
        ),
        (
            RunResult("SandboxError", "Error", None, "", "", 0.0, "no room"),
            "The code could not be run (no room); call again.",
        ),
    ],
)
def test_what_the_policy_reads(result, text):
    assert shown(result, 30.0) == text


@pytest.mark.parametrize(
    ("code", "inner"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("\n```py\nprint(1)\nprint(2)\n```\n", "print(1)\nprint(2)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```Python\r\nprint(1)\r\n```", "print(1)"),
        ("```python\n```", ""),
        ("print(1)", "print(1)"),
        ("x = '```'\nprint(x)", "x = '```'\nprint(x)"),
        ("    print(1)", "    print(1)"),
        ("```python\nprint(1)", "```python\nprint(1)"),
    ],
)
def test_fences_are_taken_off(code, inner):
    assert unfenced(code) == inner


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    async def run(self, code, *, timeout_s, stdin="", files=None):
        self.calls.append((code, timeout_s))
        return RunResult("Success", "Finished", 0, "ok", "", 0.0)

    def close(self) -> None:
        pass


def test_the_tool_and_its_schema():
    recorder = Recorder()
    tool = CodeInterpreter(recorder, timeout_s=3.0).code_interpreter
    schema = tool_schema(tool)["function"]
    assert (schema["name"], list(schema["parameters"]["properties"])) == ("code_interpreter", ["code"])
    assert asyncio.run(tool("```python\nprint(1)\n```")) == "ok"
    assert recorder.calls == [("print(1)", 3.0)]


def test_parameters_that_do_not_fit():
    for wrong in (
        {"kind": "none"},
        {"kind": "sandbox_fusion"},
        {"url": "http://x"},
        {"workers": 0},
        {"memory_mb": 16},
        {"timeout_s": 0.0},
        {"max_files": 3},
    ):
        with pytest.raises(ValidationError):
            SandboxParams.model_validate(wrong)
    assert (SandboxParams().kind, SandboxParams().timeout_s, SandboxParams().memory_mb) == ("bubblewrap", 25.0, 1024)


def test_the_example_of_the_documentation(capsys):
    page = (Path(__file__).resolve().parents[3] / "docs/sandbox.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert block is not None
    exec(compile(block[1], "docs/sandbox.md", "exec"), {})
    shown_lines = capsys.readouterr().out.splitlines()
    assert shown_lines[0] == "42" and shown_lines[-2:] == ["ZeroDivisionError: division by zero", ERROR_HINT]
