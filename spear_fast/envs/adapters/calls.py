"""Calls into an environment of another library: sync ones in threads, and none beside one that hangs."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

from spear_fast.errors import TaskError

from ..threads import Threads


class Calls:
    """The calls of one environment. Each sync one has a thread of its own, so the environment sees several threads,
    one at a time."""

    def __init__(self, threads: Threads) -> None:
        """`threads` bounds the sync calls of all environments together."""
        self._threads = threads
        self.is_left = False
        """Whether the caller gave up on a sync call: its thread may be inside the environment for good."""

    async def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what `function` returns, awaited if need be.

        Raises what it raises, and TaskError in place of what would end the run (`SystemExit`), or where an earlier call
        still runs.
        """
        if self.is_left:
            raise TaskError("an earlier call of this environment still runs; it cannot be used any more")
        call = functools.partial(function, *arguments, **named)
        if inspect.iscoroutinefunction(function):
            return await call()
        try:
            result, error = await self._threads.run(call)
        except asyncio.CancelledError:
            self.is_left = True
            raise
        if error is not None:
            raise error if isinstance(error, Exception) else TaskError(repr(error))
        return await result if inspect.isawaitable(result) else result
