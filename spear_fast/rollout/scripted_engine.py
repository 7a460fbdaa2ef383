"""The "scripted" engine: replies come from a function instead of a model, for tests and for experts' demonstrations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from spear_fast.rollout.engine import Completion, GenerationRequest

if TYPE_CHECKING:
    import torch


class ScriptedEngine:
    """Answers every request with the tokens that `reply(request)` returns, cut at the request's limit.

    Log-probs are 0, as of a policy that can do nothing else.
    """

    def __init__(self, reply: Callable[[GenerationRequest], Sequence[int]], max_model_tokens: int = 1 << 20) -> None:
        self.weights_version = 0
        self.alive = True
        self.max_model_tokens = max_model_tokens
        self._reply = reply
        self._go = asyncio.Event()
        self._go.set()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Return the scripted tokens; finish is "stop" when the last of them is a stop token."""
        await self._go.wait()
        tokens = list(self._reply(request))[: request.max_tokens]
        ended = bool(tokens) and tokens[-1] in request.stop_ids
        return Completion(tokens, [0.0] * len(tokens), "stop" if ended else "length", self.weights_version)

    def participant(self) -> AbstractContextManager[None]:
        """Nothing to count: replies are immediate."""
        return nullcontext()

    def abort(self) -> None:
        """Answer again; requests that wait are answered too."""
        self._go.set()

    def pause(self) -> None:
        """Let later requests wait; earlier ones are answered already."""
        self._go.clear()

    def resume(self) -> None:
        """Answer again."""
        self._go.set()

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the version; a script has no weights."""
        for _ in named:
            pass
        self.weights_version = version

    def weights_digest(self) -> dict[str, int]:
        """No weights."""
        return {}

    def sleep(self) -> None:
        """Nothing to free."""

    def wake(self) -> None:
        """Nothing to wake."""

    def close(self) -> None:
        """Nothing to free."""
