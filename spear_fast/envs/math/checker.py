"""Says whether answers are right, in a few processes that are killed when an answer takes too long."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from spear_fast.envs.threads import Threads
from spear_fast.errors import TaskError

from . import check_worker

COMMAND = [sys.executable, "-P", str(Path(check_worker.__file__))]
GRACE_S = 2.0
"""Seconds that a worker gets beyond the limit, which it holds itself, until it is killed."""
START_LIMIT_S = 120.0
"""Longest start of a worker, which imports sympy, in seconds."""

Dataset = tuple[str, dict[str, Any]]
"""Name and settings of a dataset of reasoning-gym, its seed among them."""


class Verdict(Enum):
    """What came of a check. All but RIGHT count as wrong."""

    RIGHT = "right"
    WRONG = "wrong"
    TIMED_OUT = "timed out"
    FAILED = "failed"
    """The checker raised or its process died."""


VERDICTS = {
    check_worker.RIGHT: Verdict.RIGHT,
    check_worker.WRONG: Verdict.WRONG,
    check_worker.TIMED_OUT: Verdict.TIMED_OUT,
    None: Verdict.TIMED_OUT,
}


class Checker:
    """A pool of worker processes, started when first needed. It can be used from any event loop."""

    def __init__(
        self, *, modules: Sequence[str] = (), datasets: Sequence[Dataset] = (), timeout_s: float, num_workers: int
    ) -> None:
        """
        Args:
            modules: What a worker imports when it starts, so that no answer pays for it.
            datasets: Those of reasoning-gym that score answers, made when a worker starts.
            timeout_s: Longest check of one answer, in seconds; waiting for a worker does not count.
            num_workers: Most processes.
        """
        self._threads = Threads(num_workers)
        setup = {"modules": list(modules), "datasets": list(datasets), "limit_s": timeout_s}
        self._workers = [_Worker(setup, timeout_s) for _ in range(num_workers)]
        # A caller that was cancelled leaves its thread; that still holds its worker, so a place of its own is needed.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    async def equal(self, reference: str, answer: str) -> Verdict:
        """Compare two answers in LaTeX by math-verify. Raises TaskError if no worker can be started."""
        return await self._ask(("equal", reference, answer))

    async def score(self, dataset: int, entry: dict[str, Any], answer: str) -> Verdict:
        """Let the dataset at place `dataset` score an answer to its item `entry`; only the full score of 1 is right.

        Raises TaskError if no worker can be started.
        """
        return await self._ask(("score", dataset, entry, answer))

    def close(self) -> None:
        """End the workers, also those that run."""
        for worker in self._workers:
            worker.close()

    async def _ask(self, request: tuple[Any, ...]) -> Verdict:
        verdict, error = await self._threads.run(lambda: self._ask_idle(request))
        if error is not None:
            raise error
        assert verdict is not None
        return verdict

    def _ask_idle(self, request: tuple[Any, ...]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, replaced when it dies. Used by one thread at a time; `close` may come from another one."""

    def __init__(self, setup: dict[str, Any], timeout_s: float) -> None:
        self._setup = setup
        self._limit_s = timeout_s + GRACE_S
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, request: tuple[Any, ...]) -> Verdict:
        process = self._started()
        reply = _exchange(process, request, self._limit_s)
        if not reply and self._end(process) == -signal.SIGALRM:
            reply = check_worker.TIMED_OUT
        return VERDICTS.get(reply, Verdict.FAILED)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._end(self._process)

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise TaskError("the task set was closed; its answers cannot be checked any more")
            if self._process is not None and self._process.poll() is None:
                return self._process
            self._process = process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=_environment(),
                start_new_session=True,  # an interrupt from the keyboard is not meant for it
            )
        if _exchange(process, self._setup, START_LIMIT_S) != check_worker.READY:
            self._end(process)
            raise TaskError(
                f"a process that checks answers did not start with {self._setup}; run {' '.join(COMMAND)} to see why"
            )
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """Make an end of the process and its forks; return its code, which is its own if it had ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        return code


def _environment() -> dict[str, str]:
    """What Python needs to find its packages, and none of the secrets that a user's environment may hold."""
    return {name: os.environ[name] for name in ("PYTHONPATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}


def _exchange(process: subprocess.Popen[bytes], message: Any, timeout_s: float) -> bytes | None:
    """Send a message and return the byte that answers it; b"" where the process died, None after `timeout_s`."""
    assert process.stdin is not None and process.stdout is not None
    data = pickle.dumps(message)
    try:
        process.stdin.write(len(data).to_bytes(4, "little") + data)
    except BrokenPipeError:
        return b""
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    return process.stdout.read(1) if readable else None
