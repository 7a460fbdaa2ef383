"""The way of trajectories to the engine, which can be shut so that all of them stand still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from spear_fast.errors import EngineError

if TYPE_CHECKING:
    from spear_fast.rollout.engine import Completion, Engine, GenerationRequest


class Gate:
    """Stands between trajectories and an engine; while it is shut, each one that arrives from either side waits.

    A trajectory is at large from its start until its end, but for the time it waits at the gate or in the engine.
    Once the gate is shut and nobody is at large, no time limit of a tool or an environment is running.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._opened = asyncio.Event()
        self._nobody = asyncio.Event()
        self._at_large = 0
        self.open()

    def open(self) -> None:
        """Let everybody pass."""
        self._opened.set()

    def shut(self) -> None:
        """Let nobody pass any more."""
        self._opened.clear()

    async def nobody_at_large(self) -> None:
        """Wait until every trajectory has come to the gate or to its end. Shut it first."""
        while self._at_large:
            self._nobody.clear()
            await self._nobody.wait()

    @asynccontextmanager
    async def outing(self) -> AsyncIterator[None]:
        """The life of a trajectory: it starts when the gate is open."""
        await self._passed()
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; see `Engine.generate`. What comes while the gate is shut is handed over later."""
        self._count(-1)
        try:
            await self._passed()
            try:
                completion = await self._engine.generate(request)
            except EngineError:
                await self._passed()
                raise
            await self._passed()
            return completion
        finally:
            self._count(1)

    async def _passed(self) -> None:
        # It may be shut again between the event and the moment at which a waiter runs.
        while not self._opened.is_set():
            await self._opened.wait()

    def _count(self, change: int) -> None:
        self._at_large += change
        if not self._at_large:
            self._nobody.set()
