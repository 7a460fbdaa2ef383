"""A bounded number of sessions at once; waiting for one counts towards no time limit."""

from __future__ import annotations

import asyncio

from ..queue_clock import QueueClock, queue_clock


class Sessions:
    """Places for `limit` sessions of one process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places = asyncio.Semaphore(limit)

    async def take(self) -> None:
        """Wait for a place."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a semaphore belongs to the loop that first waited for it
            self._loop, self._places = loop, asyncio.Semaphore(self._limit)
        clock = queue_clock.get() or QueueClock()
        with clock.running():
            await self._places.acquire()

    def give_back(self) -> None:
        """Free a place that was taken in the running loop."""
        if asyncio.get_running_loop() is self._loop:
            self._places.release()
