"""Monty, the weaker sandbox by name: results in the same shape, its limits hold, and what it lacks is said."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from spear_fast.envs.sandbox.base import Sandbox
from spear_fast.envs.sandbox.choose import SandboxParams, make_sandbox
from spear_fast.errors import MissingDependencyError, TaskError


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = make_sandbox(SandboxParams(kind="monty", workers=2, memory_mb=256, max_output_chars=1000))
    yield made
    made.close()


def run(sandbox: Sandbox, code: str, timeout_s: float = 10.0, **more):
    return asyncio.run(sandbox.run(code, timeout_s=timeout_s, **more))


@pytest.mark.parametrize(
    ("code", "status", "ending", "shown"),
    [
        ("print(2 ** 10)", "Success", "Finished", "1024\n"),
        ("import math\nprint(math.gcd(12, 18))", "Success", "Finished", "6\n"),
        ("1 / 0", "Failed", "Finished", "ZeroDivisionError"),
        ("raise ValueError('SystemExit')", "Failed", "Finished", "ValueError: SystemExit"),
        ("while True: pass", "Failed", "TimeLimitExceeded", ""),
        ("import time\nwhile True: time.sleep(5)", "Failed", "TimeLimitExceeded", ""),
        ("x = [1] * 10 ** 9", "Failed", "Finished", "MemoryError"),
        ("for i in range(2000): print('x' * 1000)", "Success", "Finished", "x" * 1000),
        ("def f(): f()\nf()", "Failed", "Finished", "RecursionError"),
        ("open('/etc/shadow')", "Failed", "Finished", "PermissionError"),
        ("import os\nos.system('id')", "Failed", "Finished", "Error"),
        ("import socket", "Failed", "Finished", "ModuleNotFoundError"),
        ("import numpy", "Failed", "Finished", "ModuleNotFoundError"),
        ("def f(:", "Failed", "Finished", "SyntaxError"),
    ],
)
def test_results_and_limits(sandbox, code, status, ending, shown):
    result = run(sandbox, code, 0.4 if ending == "TimeLimitExceeded" else 10.0)
    assert (result.status, result.ending) == (status, ending), result
    assert result.return_code == (0 if status == "Success" else 1)
    assert shown in result.stdout + result.stderr
    assert len(result.stdout) <= 1000
    assert run(sandbox, "print('next')").stdout == "next\n"


def test_programs_share_nothing(sandbox):
    run(sandbox, "x = 5")
    assert "NameError" in run(sandbox, "print(x)").stderr


def test_there_is_no_input(sandbox):
    with pytest.raises(TaskError, match="neither stdin nor files"):
        run(sandbox, "print(1)", stdin="x")
    with pytest.raises(TaskError, match="neither stdin nor files"):
        run(sandbox, "print(1)", files={"a": b""})


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(MissingDependencyError, match=r"sandbox-monty"):
        make_sandbox(SandboxParams(kind="monty"))
