"""Time limits that hold also while the event loop is busy with a forward pass, and do not count waiting in a queue."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable
from typing import TypeVar

from spear_fast.envs.queue_clock import QueueClock, queue_clock

Result = TypeVar("Result")


async def within(awaitable: Awaitable[Result], timeout_s: float) -> Result:
    """Return the result of `awaitable`, or cancel it and raise TimeoutError after `timeout_s` seconds.

    Unlike `asyncio.wait_for`, a result that is there when the loop comes to look counts, however late that is: the
    loop may have been held up by the engine, not by the awaitable. Neither the time until it begins nor the time that
    it waits for a thread (`Threads.run`) counts.
    """
    clock = QueueClock()
    began: float | None = None

    async def begin() -> Result:
        nonlocal began
        began = time.monotonic()
        queue_clock.set(clock)  # in the context of this task only
        return await awaitable

    future = asyncio.ensure_future(begin())
    remaining = timeout_s
    try:
        while not future.done():
            await asyncio.wait({future}, timeout=remaining)
            spent = 0.0 if began is None else time.monotonic() - began - clock.seconds()
            remaining = timeout_s - spent
            if not future.done() and remaining <= 0.0:
                raise TimeoutError(f"no answer within {timeout_s} s")
        return future.result()
    finally:
        future.cancel()
        if began is None and inspect.iscoroutine(awaitable):
            awaitable.close()
