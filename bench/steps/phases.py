"""Wall time by phase, where a phase inside another one stops the outer one's clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES: tuple[str, ...] = ("generation", "tools", "scoring", "update", "sync", "rest")
"""Sampling; waiting for tools and rendering what they said; log-probs before the update; forward and backward passes
and optimizer; weights into the engine; everything else, e.g. rewards, advantages and padding."""


class PhaseClock:
    """Seconds of one step. On CUDA each change of phase waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was measured and begin a step, in the phase "rest"."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._stack = ["rest"]
        self._since = self._started = self._now()

    def stop(self) -> float:
        """Return the seconds since `restart`; the phases add up to them."""
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
        return now - self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the enclosed time as `name`, but for what inner phases take."""
        self._change()
        self._stack.append(name)
        try:
            yield
        finally:
            self._change()
            self._stack.pop()

    def wrap(self, owner: Any, attribute: str, name: str | Callable[[], str]) -> None:
        """Count every call of `owner.attribute` as phase `name`, or as what `name()` says at the call."""
        inner = getattr(owner, attribute)

        @functools.wraps(inner)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.phase(name() if callable(name) else name):
                return inner(*arguments, **named)

        setattr(owner, attribute, timed)

    def _change(self) -> None:
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
