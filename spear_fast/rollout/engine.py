"""The interface between rollout and whatever samples tokens."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from spear_fast.errors import EngineError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GenerationRequest:
    """One message to sample, token-in.

    Example: `GenerationRequest(uid=7, prompt=[1, 5, 9], max_tokens=64, temperature=1.0, stop_ids=(2,), seed=123)`.
    """

    uid: int
    """The trajectory; a later request of the same uid often begins with the tokens of the earlier one, whose cache is
    worth keeping."""
    prompt: list[int]
    """All tokens so far."""
    max_tokens: int
    temperature: float
    """0 means greedy; log-probs are then those at temperature 1."""
    stop_ids: tuple[int, ...]
    seed: int
    """Draws depend on (seed, position) only, never on the batch they were sampled in."""
    top_p: float = 1.0
    """Draw from the smallest set of the likeliest tokens whose probabilities at the temperature add up to this, in
    (0, 1]. Log-probs are those within the set, so training needs 1."""


@dataclass(frozen=True)
class Completion:
    """The sampled tokens, token-out."""

    tokens: list[int]
    """Sampled tokens, the stop token included."""
    logps: list[float]
    """Log-prob of each sampled token at the sampling temperature, nats."""
    finish: Literal["stop", "length", "abort"]
    version: int
    """Oldest version of the weights that sampled it; a request that was paused may span several."""


class Engine(Protocol):
    """Samples many requests at once; requests may arrive and finish at any time (continuous batching)."""

    weights_version: int
    max_model_tokens: int
    """Longest prompt plus completion, in tokens."""

    @property
    def alive(self) -> bool:
        """Whether it can serve; a dead one fails every request, and its next `load_weights` starts it anew."""
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises EngineError if the request cannot be served."""
        ...

    def participant(self) -> AbstractContextManager[None]:
        """Mark a coroutine that will send requests. In deterministic mode the engine advances only when every
        participant waits for it, which makes batches independent of how long tools take."""
        ...

    def abort(self) -> None:
        """Give up every request, paused ones too; each raises EngineError. The engine can be used again, unpaused."""
        ...

    def pause(self) -> None:
        """Take every request off the device and keep what it has sampled; requests, new ones too, wait for `resume`."""
        ...

    def resume(self) -> None:
        """Go on with the paused requests, under the weights that are loaded now."""
        ...

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy new weights in, drop every cache computed with the old ones, and take the new version.

        `named` are all parameters under their Hugging Face names, a tied head left out; a tensor is valid until the
        next is asked for. Weights that sleep are woken.
        Raises EngineError while requests run; paused ones are fine.
        """
        ...

    def weights_digest(self) -> dict[str, int]:
        """`weights_digest.digest` of the values that the engine samples with, by Hugging Face parameter name."""
        ...

    def sleep(self) -> None:
        """Free what generation holds: caches, and with a memory plan that says so the weights; the version is kept."""
        ...

    def wake(self) -> None:
        """Make the engine ready for requests again."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


def check_length(request: GenerationRequest, max_model_tokens: int) -> None:
    """Raise EngineError for a request that has no prompt, asks for nothing or leaves no room for a token."""
    if len(request.prompt) >= max_model_tokens or not request.prompt or request.max_tokens < 1:
        raise EngineError(
            f"request {request.uid}: a prompt of {len(request.prompt)} tokens with max_tokens={request.max_tokens} "
            f"does not fit max_model_tokens={max_model_tokens}; raise rollout.max_tokens or shorten the prompt"
        )
