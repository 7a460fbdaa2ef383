"""The "hf" engine: continuous batching over any transformers causal model, embedded in the training process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Completion, GenerationRequest, check_length
from spear_fast.rollout.sampling import sample, uniforms
from spear_fast.rollout.slot_cache import SlotBatch, SlotCache, slot_attention
from spear_fast.weights_digest import Digests

ATTENTION = "spear_slots"
PREFILL_TOKENS = 16384
"""Padded prompt tokens of one forward pass."""


def _no_mask(*_: Any, **__: Any) -> None:
    """The slot batch carries its own mask, so transformers need not build one."""


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@dataclass(eq=False)
class _Running:
    """A request in flight."""

    request: GenerationRequest
    future: asyncio.Future[Completion]
    sampled: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    version: int | None = None
    """Of the weights that sampled the first token."""

    @property
    def tokens(self) -> list[int]:
        """What must be computed before the next token is sampled."""
        return [*self.request.prompt, *self.sampled]


class HFEngine:
    """Samples for many trajectories at once, one token per running request and forward pass.

    A trajectory that waits for a tool keeps its cache, so a later turn computes only its new tokens, and requests
    with the same prompt (the G samples of a group) are prefilled once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_slots: int,
        max_model_tokens: int,
        vocab_size: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """
        Args:
            model: A transformers causal model of the engine's own; it is never trained.
            max_slots: Requests that run at once.
            max_model_tokens: Longest prompt plus completion, in tokens.
            vocab_size: Token ids from it on are never sampled; None allows all that the head has.
            deterministic: Advance only when every participant waits for the engine.

        Raises:
            EngineError: The model has no head.
        """
        self.weights_version = 0
        self.alive = True
        self.max_model_tokens = max_model_tokens
        self._model = model.eval()
        self._model.requires_grad_(False)
        self._model.set_attn_implementation(ATTENTION)
        head = model.get_output_embeddings()
        if head is None:
            raise EngineError(f"{type(model).__name__} has no language-model head; the hf engine cannot sample from it")
        self._head = head
        self._parameters = dict(model.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._vocab_size = vocab_size
        self._deterministic = deterministic
        self._cache = SlotCache(max_slots, max_model_tokens)
        self._unanswered: set[_Running] = set()
        self._running: list[_Running] = []
        self._waiting: list[_Running] = []
        self._participants = 0
        self._paused = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; see `Engine.generate`."""
        check_length(request, self.max_model_tokens)
        loop = asyncio.get_running_loop()
        running = _Running(request, loop.create_future())
        self._unanswered.add(running)
        running.future.add_done_callback(lambda _: self._unanswered.discard(running))
        self._waiting.append(running)
        if self._task is None or self._task.done():
            self._changed = asyncio.Event()  # an event belongs to the loop that first waits for it
            self._task = loop.create_task(self._serve())
        self._changed.set()
        return await running.future

    @contextmanager
    def participant(self) -> Iterator[None]:
        """Count a coroutine that will send requests; see `Engine.participant`."""
        self._participants += 1
        try:
            yield
        finally:
            self._participants -= 1
            self._changed.set()

    def abort(self) -> None:
        """Give up every request; see `Engine.abort`."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._paused = False
        self._give_up(EngineError("the request was aborted"))

    def pause(self) -> None:
        """Free the slots of all requests and keep what they have sampled; see `Engine.pause`."""
        self._paused = True
        while self._running:
            self._cache.release(len(self._running) - 1)
            self._waiting.append(self._running.pop())

    def resume(self) -> None:
        """Prefill the paused requests again, with what they had sampled; see `Engine.resume`."""
        self._paused = False
        self._changed.set()

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights in and drop the cache; see `Engine.load_weights`.

        Raises:
            EngineError: A name or shape is unknown, a parameter is missing, or requests are running.
        """
        self._refuse_while_running("load_weights")
        missing = set(self._parameters)
        for name, tensor in named:
            own = self._parameters.get(name)
            if own is None or own.shape != tensor.shape:
                raise EngineError(f"load_weights got {name!r} of shape {tuple(tensor.shape)}, which this model lacks")
            own.copy_(tensor)
            missing.discard(name)
        if missing:
            raise EngineError(f"load_weights got no value for {sorted(missing)[:3]}; a partial update would be stale")
        self._cache.clear()
        self.weights_version = version

    def weights_digest(self) -> dict[str, int]:
        """Digests of the engine's parameters; see `Engine.weights_digest`."""
        digests = Digests()
        for name, parameter in self._parameters.items():
            digests.add(name, parameter)
        return digests.result()

    def sleep(self) -> None:
        """Free the cache; see `Engine.sleep`. Raises EngineError while requests run."""
        self._refuse_while_running("sleep")
        self._cache.free()

    def wake(self) -> None:
        """Nothing to do: the next request allocates the cache."""

    def close(self) -> None:
        """Free the cache and drop the model's reference."""
        self.abort()
        self._cache.free()
        self._parameters.clear()

    def _refuse_while_running(self, what: str) -> None:
        if self._unanswered and not self._paused:
            raise EngineError(f"{what} was called while requests are running; pause them or wait for them first")

    async def _serve(self) -> None:
        """Run until no request is left; a failure is handed to every request."""
        try:
            while self._waiting or self._running:
                await self._let_others_run()
                self._admit()
                self._decode()
        except Exception as error:
            failure = EngineError(f"the hf engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._give_up(failure)

    def _give_up(self, failure: EngineError) -> None:
        for running in list(self._unanswered):
            if not running.future.done():
                running.future.set_exception(failure)
        self._unanswered.clear()
        self._running.clear()
        self._waiting.clear()
        self._cache.abandon()

    async def _let_others_run(self) -> None:
        await asyncio.sleep(0)
        while self._paused or (self._deterministic and len(self._waiting) + len(self._running) < self._participants):
            self._changed.clear()
            await self._changed.wait()

    @torch.inference_mode()
    def _admit(self) -> None:
        """Prefill waiting requests while slots are free, in the order of their trajectories."""
        self._waiting.sort(key=lambda running: running.request.uid)
        admitted = self._waiting[: self._cache.num_free]
        del self._waiting[: len(admitted)]
        # Equal prompts become neighbours; among equal lengths the order stays that of the trajectories.
        admitted.sort(key=lambda running: (-len(running.tokens), running.tokens))
        start = 0
        while start < len(admitted):
            longest = len(admitted[start].tokens)
            count = max(1, PREFILL_TOKENS // longest)
            self._prefill(admitted[start : start + count])
            start += count

    def _prefill(self, admitted: list[_Running]) -> None:
        """Compute the tokens of requests that start, or go on after a pause, and sample the next token of each."""
        first = self._cache.num_running
        fresh: list[tuple[list[int], int]] = []
        leader_by_prompt: dict[tuple[int, ...], int] = {}
        followers: list[_Running] = []
        for running in admitted:
            prompt = running.tokens
            if tuple(prompt) in leader_by_prompt:
                followers.append(running)
                continue
            leader_by_prompt[tuple(prompt)] = len(fresh)
            kept = self._cache.acquire(running.request.uid, prompt)
            fresh.append((prompt[kept:], kept))
            self._running.append(running)
        logits = self._forward(first, fresh)
        source = list(range(len(fresh)))
        for running in followers:
            leader = leader_by_prompt[tuple(running.tokens)]
            self._cache.acquire(running.request.uid, running.tokens)
            self._cache.copy(first + leader, self._cache.num_running - 1)
            self._running.append(running)
            source.append(leader)
        self._emit(first, logits[torch.tensor(source, device=self._device)])

    @torch.inference_mode()
    def _decode(self) -> None:
        """Advance every running request by one token."""
        if self._running:
            fresh = [
                (running.sampled[-1:], len(running.request.prompt) + len(running.sampled) - 1)
                for running in self._running
            ]
            self._emit(0, self._forward(0, fresh))

    def _forward(self, first: int, fresh: list[tuple[list[int], int]]) -> Tensor:
        """Feed each slot from `first` on its new tokens and return the logits [B, V] after the last one.

        Args:
            first: First slot of the batch.
            fresh: Per row the new tokens and the position of the first of them.
        """
        width = max(len(tokens) for tokens, _ in fresh)
        ids = np.zeros((len(fresh), width), dtype=np.int64)
        positions = np.full((len(fresh), width), self._cache.length, dtype=np.int64)
        for row, (tokens, start) in enumerate(fresh):
            ids[row, : len(tokens)] = tokens
            positions[row, : len(tokens)] = range(start, start + len(tokens))
            self._cache.slots[first + row].tokens.extend(tokens)
        lengths = np.array([start + len(tokens) for tokens, start in fresh])
        where = torch.from_numpy(positions).to(self._device)
        mask = torch.arange(int(lengths.max()), device=self._device) <= where[:, None, :, None]
        hidden = self._model.base_model(
            input_ids=torch.from_numpy(ids).to(self._device),
            position_ids=where.clamp(max=self._cache.length - 1),
            use_cache=False,
            slot_batch=SlotBatch(self._cache, first, where, mask),
        ).last_hidden_state
        last = torch.tensor([len(tokens) - 1 for tokens, _ in fresh], device=self._device)
        rows = torch.arange(len(fresh), device=self._device)
        return self._head(hidden[rows, last])[:, : self._vocab_size]

    def _emit(self, first: int, logits: Tensor) -> None:
        """Sample one token for each slot from `first` on and retire the requests that ended."""
        batch = self._running[first:]
        requests = [running.request for running in batch]
        draws = uniforms(
            np.array([request.seed for request in requests], dtype=np.uint64),
            np.array([len(r.request.prompt) + len(r.sampled) for r in batch], dtype=np.uint64),
        )
        temperatures = torch.tensor([request.temperature for request in requests], device=self._device)
        shares = [request.top_p for request in requests]
        # Training draws from the whole distribution, and then nothing is made or looked at for it.
        top_p = torch.tensor(shares, device=self._device) if min(shares) < 1.0 else None
        tokens, logps = sample(logits, temperatures, torch.from_numpy(draws), top_p)
        for running, token, logp in zip(batch, tokens.tolist(), logps.tolist(), strict=True):
            running.version = self.weights_version if running.version is None else running.version
            running.sampled.append(token)
            running.logps.append(logp)
        # From the back, because a released slot is filled with the last running one.
        for index in range(len(self._running) - 1, first - 1, -1):
            self._retire_if_done(index)

    def _retire_if_done(self, index: int) -> None:
        running = self._running[index]
        request = running.request
        stopped = running.sampled[-1] in request.stop_ids
        broken = not math.isfinite(running.logps[-1])
        room = min(request.max_tokens, self.max_model_tokens - len(request.prompt))
        if not (stopped or broken) and len(running.sampled) < room:
            return
        self._cache.release(index)
        self._running[index] = self._running[-1]
        self._running.pop()
        if not running.future.done():
            # A log-prob that is not a number would poison every loss the trajectory enters.
            finish = "abort" if broken else "stop" if stopped else "length"
            version = self.weights_version if running.version is None else running.version
            running.future.set_result(Completion(running.sampled, running.logps, finish, version))
