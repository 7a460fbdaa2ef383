"""The "vllm" engine: an asyncio front that keeps one vLLM core busy, in this process or in its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from spear_fast.errors import ConfigError, EngineError, MissingDependencyError
from spear_fast.rollout.engine import Completion, GenerationRequest, check_length
from spear_fast.rollout.vllm_core import CoreHost, CoreRequest, Progress
from spear_fast.seeds import derive_seed

R = TypeVar("R")
_COOLEST = 0.01
"""vLLM raises any lower temperature above 0 to this one."""


@dataclass(eq=False)
class _Open:
    """A request without an answer; what it has sampled survives a pause."""

    key: int
    request: GenerationRequest
    future: asyncio.Future[Completion]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    version: int | None = None


class VllmEngine:
    """Samples with vLLM: continuous batching, stepping in a thread of its own while coroutines and tools run.

    Weights must be pushed before the first request. If the core fails or its process dies, every request raises
    EngineError, `alive` is False, and the next `load_weights` starts a new core.
    """

    def __init__(
        self, make_core: Callable[[], CoreHost], *, max_model_tokens: int, vocab_size: int, deterministic: bool = False
    ) -> None:
        """
        Args:
            make_core: Starts a core; called in the engine's own thread, again whenever a dead one is replaced.
            max_model_tokens: Longest prompt plus completion, in tokens.
            vocab_size: Token ids a prompt may hold are below it.
            deterministic: Advance only when every participant waits for the engine, and step in the caller's thread.

        Raises:
            SpearError: The core does not start.
        """
        self.weights_version = 0
        self.max_model_tokens = max_model_tokens
        self._make_core = make_core
        self._vocab_size = vocab_size
        self._deterministic = deterministic
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._failed = False
        self._core = self._in_thread(make_core)
        self._next_key = 0
        self._open: set[_Open] = set()
        self._waiting: list[_Open] = []
        self._running: dict[int, _Open] = {}
        self._advancing: Future[list[Progress]] | None = None
        self._paused = False
        self._participants = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether requests can be served; if not, `load_weights` starts a new core."""
        return not self._failed and self._core.alive

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; see `Engine.generate`."""
        self._check(request)
        loop = asyncio.get_running_loop()
        opened = _Open(self._next_key, request, loop.create_future())
        self._next_key += 1
        self._open.add(opened)
        self._waiting.append(opened)
        opened.future.add_done_callback(lambda _: self._answered(opened))
        if self._task is None or self._task.done():
            self._changed = asyncio.Event()  # an event belongs to the loop that first waits for it
            self._task = loop.create_task(self._serve())
        self._wake_up()
        return await opened.future

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
        self._withdraw()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._paused = False
        self._give_up(EngineError("the request was aborted"))

    def pause(self) -> None:
        """Take every request off the core; see `Engine.pause`. Waits for the step that is under way."""
        self._paused = True
        self._withdraw()

    def resume(self) -> None:
        """Send the paused requests again, as prompts that end with what they had sampled; see `Engine.resume`."""
        self._paused = False
        self._changed.set()

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights in and drop the caches, in a new core if the old one died; see `Engine.load_weights`.

        Raises:
            EngineError: A name or shape is unknown, a parameter is missing, or requests are running. After a partial
                load the engine refuses requests until a complete one.
        """
        self._refuse_while_running("load_weights")
        if not self.alive:
            with suppress(Exception):  # it may be too broken to end in order
                self._in_thread(self._core.close)
            self._core = self._in_thread(self._make_core)
            self._failed = False
        self._in_thread(self._core.begin_load)
        for name, tensor in named:
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()  # the engine's thread has another one
            self._in_thread(self._write, name, tensor)
        missing = self._in_thread(self._core.finish_load)
        if missing:
            raise EngineError(f"load_weights got no value for {sorted(missing)[:3]}; a partial update would be stale")
        self.weights_version = version

    def weights_digest(self) -> dict[str, int]:
        """Digests of what the core samples with; see `Engine.weights_digest`."""
        self._core.interrupt()  # an advance that is under way would have to end first
        return self._in_thread(self._core.weights_digest)

    def sleep(self) -> None:
        """Free the caches and, as the sleep level says, the weights; see `Engine.sleep`.

        Raises:
            EngineError: Requests are running; paused ones are fine.
        """
        self._refuse_while_running("sleep")
        self._in_thread(self._core.sleep)

    def wake(self) -> None:
        """Undo `sleep`. After sleep level 2, weights must be pushed too, before or after."""
        self._in_thread(self._core.wake)

    def close(self) -> None:
        """Abort every request and free everything."""
        self.abort()
        with suppress(Exception):  # a core that died has nothing left to free
            self._in_thread(self._core.close)
        self._failed = True
        self._thread.shutdown()

    def _check(self, request: GenerationRequest) -> None:
        """Raise EngineError for a request that cannot be served; vLLM would fail all of them."""
        check_length(request, self.max_model_tokens)
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocab_size:
            raise EngineError(
                f"request {request.uid}: the prompt holds token ids {min(request.prompt)} to {max(request.prompt)}, "
                f"but the vocabulary has {self._vocab_size}; use the tokenizer that the engine was built for"
            )
        if request.temperature != 0 and request.temperature < _COOLEST:
            raise EngineError(
                f"request {request.uid}: temperature={request.temperature} is below {_COOLEST}, the lowest that vLLM "
                "samples at; raise rollout.temperature, or take 0 for greedy"
            )
        if not self.alive:
            raise EngineError("the vllm engine failed; load_weights starts a new one")

    def _refuse_while_running(self, what: str) -> None:
        if self._open and not self._paused:
            raise EngineError(f"{what} was called while requests are running; pause them or wait for them first")
        self._drop_answered()

    def _write(self, name: str, tensor: Tensor) -> None:
        self._core.write(name, tensor)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # the caller may free the tensor now

    def _in_thread(self, function: Callable[..., R], *args: Any) -> R:
        """Run one call of the core in its thread and wait for it; anything unexpected marks the core as failed."""
        try:
            return self._thread.submit(function, *args).result()
        except (EngineError, ConfigError, MissingDependencyError):
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> EngineError:
        if isinstance(error, EngineError):
            return error
        self._failed = True
        failure = EngineError(f"the vllm engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    async def _serve(self) -> None:
        """Run until no request is left; a failure is handed to every request."""
        try:
            while self._open:
                await self._let_others_run()
                self._drop_answered()
                adds = self._admit()
                if not self._running:
                    continue
                self._core.rearm()
                self._advancing = advancing = self._thread.submit(self._core.advance, adds)
                if not self._deterministic:
                    with suppress(Exception):  # `_collect` reports it
                        await asyncio.wrap_future(advancing)
                self._collect(advancing)
        except asyncio.CancelledError:
            if asyncio.current_task() is self._task:  # the loop ends; `abort` has withdrawn them itself
                self._withdraw()
            raise
        except Exception as error:
            self._give_up(self._failure(error))

    async def _let_others_run(self) -> None:
        await asyncio.sleep(0)
        while self._open and (self._paused or (self._deterministic and len(self._open) < self._participants)):
            self._changed.clear()
            await self._changed.wait()

    def _admit(self) -> list[CoreRequest]:
        """Move what waits to the core, in the order of trajectories; it queues what exceeds its batch."""
        if self._paused:
            return []
        self._waiting.sort(key=lambda opened: (opened.request.uid, opened.key))
        adds = [self._to_core(opened) for opened in self._waiting]
        self._running.update({opened.key: opened for opened in self._waiting})
        self._waiting.clear()
        return adds

    def _to_core(self, opened: _Open) -> CoreRequest:
        request, sampled = opened.request, len(opened.tokens)
        # A generator that starts anew after a pause must not repeat the draws made before it.
        seed = derive_seed(request.seed, "resumed", sampled) if sampled else request.seed
        return CoreRequest(
            key=opened.key,
            tokens=[*request.prompt, *opened.tokens],
            max_tokens=min(request.max_tokens, self.max_model_tokens - len(request.prompt)) - sampled,
            temperature=request.temperature,
            stop_ids=tuple(token for token in request.stop_ids if token < self._vocab_size),
            seed=seed & 0x7FFF_FFFF_FFFF_FFFF,
            top_p=request.top_p,
        )

    def _collect(self, advancing: Future[list[Progress]]) -> None:
        """Take what an advance brought, once: a pause may have been faster than the serving task."""
        if self._advancing is not advancing:
            return
        self._advancing = None
        try:
            progress = advancing.result()
        except Exception as error:
            self._give_up(self._failure(error))
        else:
            self._take(progress)

    def _take(self, progress: list[Progress]) -> None:
        broken = []
        for gained in progress:
            opened = self._running.get(gained.key)
            if opened is None:
                continue
            if opened.version is None:
                opened.version = self.weights_version
            # A log-prob that is not a number would poison every loss the trajectory enters.
            bad = next((i for i, logp in enumerate(gained.logps) if not math.isfinite(logp)), None)
            end = None if bad is None else bad + 1
            opened.tokens.extend(gained.tokens[:end])
            opened.logps.extend(gained.logps[:end])
            if bad is not None and gained.finish is None:
                broken.append(gained.key)
            if bad is not None or gained.finish is not None:
                del self._running[gained.key]
                self._answer(opened, None if bad is not None else gained.finish)
        if broken:
            self._in_thread(self._core.abort, broken)

    def _answer(self, opened: _Open, reason: str | None) -> None:
        finish: Literal["stop", "length", "abort"] = (
            "stop" if reason == "stop" else "length" if reason == "length" else "abort"
        )
        if not opened.future.done():
            version = self.weights_version if opened.version is None else opened.version
            opened.future.set_result(Completion(opened.tokens, opened.logps, finish, version))

    def _answered(self, opened: _Open) -> None:
        self._open.discard(opened)
        if opened.future.cancelled():
            self._wake_up()

    def _wake_up(self) -> None:
        """Let the serving task see what changed; in deterministic mode an advance is never cut short."""
        self._changed.set()
        if not self._deterministic:
            self._core.interrupt()

    def _drop_answered(self) -> None:
        """Forget requests whose coroutines were cancelled."""
        self._waiting = [opened for opened in self._waiting if not opened.future.done()]
        gone = [key for key, opened in self._running.items() if opened.future.done()]
        for key in gone:
            del self._running[key]
        if gone and self.alive:
            self._in_thread(self._core.abort, gone)

    def _withdraw(self) -> None:
        """Take all requests off the core and keep what they have sampled."""
        advancing = self._advancing
        if advancing is not None:
            self._core.interrupt()
            self._collect(advancing)
        running, self._running = self._running, {}
        self._waiting = [*running.values(), *self._waiting]
        if running and self.alive:
            self._in_thread(self._core.abort, list(running))

    def _give_up(self, failure: EngineError) -> None:
        """Answer every request with the failure."""
        for opened in list(self._open):
            if not opened.future.done():
                opened.future.set_exception(failure)
        self._open.clear()
        self._running.clear()
        self._waiting.clear()
