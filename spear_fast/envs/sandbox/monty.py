"""The weaker sandbox, to be chosen by name: Pydantic's Monty, an interpreter of a part of Python without system access.

It needs no namespaces and starts in no time, but what it keeps apart rests on one program's correctness, and it has
neither numpy nor sympy, nor most of the standard library.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from spear_fast.envs.threads import Threads
from spear_fast.errors import MissingDependencyError, TaskError

from .base import RunResult

MIB = 1 << 20
GRACE_S = 5.0
"""Seconds beyond a program's limit after which its process is killed from outside."""
TIME_IS_UP = ("TimeoutError: feed time limit exceeded", "TimeoutError: sleep limit exceeded")


class _Output:
    """What a program printed, up to a limit."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._left = {"stdout": most, "stderr": most}

    def take(self, stream: str, text: str) -> None:
        part = text[: self._left[stream]]
        if part:
            self._left[stream] -= len(part)
            self._parts[stream].append(part)

    def text(self, stream: str) -> str:
        return "".join(self._parts[stream])


class MontySandbox:
    """Runs programs in up to `workers` processes of Monty."""

    def __init__(self, workers: int, memory_mb: int, max_output_chars: int) -> None:
        """
        Args:
            workers: Programs at once.
            memory_mb: Heap of a program, in MiB.
            max_output_chars: Characters kept of each stream.

        Raises:
            MissingDependencyError: pydantic-monty is not installed.
        """
        try:
            import pydantic_monty
        except ImportError as error:
            raise MissingDependencyError("pydantic-monty", "sandbox-monty", "sandbox.kind=monty") from error
        self._monty = pydantic_monty
        self._workers = workers
        self._memory_mb = memory_mb
        self._max_output_chars = max_output_chars
        self._threads = Threads(workers)
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._pool: Any = None

    async def run(
        self, code: str, *, timeout_s: float, stdin: str = "", files: Mapping[str, bytes] | None = None
    ) -> RunResult:
        """Run `code`; see `Sandbox.run`. Raises TaskError where `stdin` or `files` are given: there are none here."""
        if stdin or files:
            raise TaskError("sandbox.kind=monty has neither stdin nor files; use kind=bubblewrap for this task")
        result, error = await self._threads.run(lambda: self._run(code, timeout_s))
        if result is None:
            return RunResult("SandboxError", "Error", None, "", "", 0.0, f"{type(error).__name__}: {error}")
        return result

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._pool = None
            self._stack.close()

    def _started(self) -> Any:
        with self._lock:
            if self._pool is None:
                pool = self._monty.Monty(max_processes=self._workers, feed_duration_limit_grace=GRACE_S)
                self._pool = self._stack.enter_context(pool)
            return self._pool

    def _run(self, code: str, timeout_s: float) -> RunResult:
        limits = {
            "max_feed_duration_secs": timeout_s,
            "max_memory": self._memory_mb * MIB,
            "max_total_sleep_secs": timeout_s,
        }
        output, error, stopped = _Output(self._max_output_chars), "", False
        pool, began = self._started(), time.monotonic()
        try:
            with pool.checkout(limits=limits) as session:
                session.feed_run(code, print_callback=output.take)
        except self._monty.MontyCrashedError as crash:
            stopped = bool(getattr(crash, "timed_out", False))
            error = str(crash)
        except self._monty.MontyError as failure:
            error = _traceback(failure)
            stopped = _last_line(error).startswith(TIME_IS_UP)
        ended_well = not error or _last_line(error) in ("SystemExit", "SystemExit: 0")
        return RunResult(
            "Success" if ended_well else "Failed",
            "TimeLimitExceeded" if stopped else "Finished",
            0 if ended_well else 1,
            output.text("stdout"),
            (output.text("stderr") + ("" if ended_well else error))[-self._max_output_chars :],
            time.monotonic() - began,
        )


def _traceback(error: Any) -> str:
    display = getattr(error, "display", None)
    return str(display()) if callable(display) else str(error)


def _last_line(text: str) -> str:
    return (text.rstrip().splitlines() or [""])[-1]
