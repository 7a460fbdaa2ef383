"""How long a call has waited for its turn, so that its time limit need not count it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class QueueClock:
    """Seconds during which something under a time limit waited for a place."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since = 0.0
        self._waiting = 0

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._seconds + (time.monotonic() - self._since if self._waiting else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside; together, if several wait at once."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += 1
        try:
            yield
        finally:
            total = self.seconds()
            self._waiting -= 1
            if not self._waiting:
                self._seconds = total


queue_clock: ContextVar[QueueClock | None] = ContextVar("queue_clock", default=None)
"""The clock of the time limit that the running coroutine is under."""
