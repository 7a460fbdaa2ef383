"""Blocking calls in threads: a bounded number at once, and neither a pool nor the exit waits for one that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from spear_fast.envs.queue_clock import QueueClock, queue_clock
from spear_fast.errors import TaskError

Result = TypeVar("Result")

MOST_LEFT = 256
"""Threads of one process that may hang on after their callers gave up; then further calls fail."""


class _Left:
    """Counts the threads of this process whose callers gave up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self, change: int) -> None:
        with self._lock:
            self.count += change


_left = _Left()


def threads_left() -> int:
    """Return how many threads of this process still run although their callers gave up."""
    return _left.count


class _Call(Generic[Result]):
    """One function in a daemon thread of its own, so that a hanging one cannot block the exit."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._is_over = False
        self._counted_in: _Left | None = None
        self.future: asyncio.Future[tuple[Result | None, BaseException | None]] = self._loop.create_future()
        threading.Thread(target=self._work, daemon=True).start()

    def leave(self) -> None:
        """Count the thread as left until it ends."""
        with self._lock:
            if not self._is_over:
                self._counted_in = _left
                _left.add(1)

    def _work(self) -> None:
        result, error = None, None
        try:
            result = self._function()
        except BaseException as raised:
            error = raised
        with self._lock:
            self._is_over = True
            if self._counted_in is not None:
                self._counted_in.add(-1)
        # The loop is gone when a call outlives the run that gave up on it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, (result, error))

    def _settle(self, outcome: tuple[Result | None, BaseException | None]) -> None:
        if not self.future.done():
            self.future.set_result(outcome)


class Threads:
    """Runs up to `limit` blocking functions at once. A call that is cancelled gives its place back at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
        """Return what `function` returned and what it raised, whatever that was, `SystemExit` included.

        Raises:
            TaskError: `MOST_LEFT` threads hang.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a semaphore belongs to the loop that first waited for it
            self._loop, self._places = loop, asyncio.Semaphore(self._limit)
        clock = queue_clock.get() or QueueClock()
        places = self._places
        with clock.running():
            await places.acquire()
        try:
            if threads_left() >= MOST_LEFT:
                raise TaskError(
                    f"{threads_left()} threads of tools or rewards that timed out still run; give them a time limit of "
                    "their own, or make them async"
                )
            call = _Call(function)
            try:
                return await call.future
            except asyncio.CancelledError:
                call.leave()
                raise
        finally:
            places.release()
