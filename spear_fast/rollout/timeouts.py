"""Time limits that hold also while the event loop is busy with a forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(awaitable: Awaitable[Result], timeout_s: float) -> Result:
    """Return the result of `awaitable`, or cancel it and raise TimeoutError after `timeout_s` seconds.

    Unlike `asyncio.wait_for`, a result that is there when the loop comes to look counts, however late that is: the
    loop may have been held up by the engine, not by the awaitable.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({future}, timeout=timeout_s)
        if not future.done():
            raise TimeoutError(f"no answer within {timeout_s} s")
        return future.result()
    finally:
        future.cancel()
