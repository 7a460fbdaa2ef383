"""One vLLM engine, synchronous: takes requests, advances them, takes weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spear_fast.errors import EngineError
from spear_fast.rollout import vllm_compat
from spear_fast.rollout.vllm_compat import CoreSettings
from spear_fast.rollout.vllm_isolation import kept_rng, kept_torch_rng, own_process_group, plain_environment
from spear_fast.rollout.weight_layout import WeightLayout
from spear_fast.weights_digest import Digests

_DRAIN_STEPS = 8
"""Steps after which aborted requests must have given their blocks back; asynchronous scheduling needs two."""


@dataclass(frozen=True)
class CoreRequest:
    """A request as the core sees it; `key` names it in what the core returns."""

    key: int
    tokens: list[int]
    max_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    top_p: float


@dataclass
class Progress:
    """What a request gained while the core advanced."""

    key: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: str | None = None
    """vLLM's reason, None while the request runs."""


class CoreHost(Protocol):
    """A core and the place where it runs. All but `interrupt` and `rearm` block, and are called from one thread."""

    @property
    def alive(self) -> bool:
        """Whether the core can still be used; a dead one is replaced."""
        ...

    def rearm(self) -> None:
        """Forget earlier interrupts."""
        ...

    def interrupt(self) -> None:
        """Make `advance` return after its current step. May be called from any thread."""
        ...

    def advance(self, adds: Sequence[CoreRequest]) -> list[Progress]:
        """Add requests and step until one finishes or `interrupt` was called; return all that was sampled."""
        ...

    def abort(self, keys: Sequence[int]) -> None:
        """Drop requests and what they sampled since the last `advance`."""
        ...

    def begin_load(self) -> None:
        """Expect every parameter anew."""
        ...

    def write(self, name: str, tensor: Tensor) -> None:
        """Take one parameter, by its Hugging Face name."""
        ...

    def finish_load(self) -> set[str]:
        """Drop every cache and return the names that were not written; none means that the core is ready."""
        ...

    def weights_digest(self) -> dict[str, int]:
        """Digest of each parameter as the core holds it."""
        ...

    def sleep(self) -> None:
        """Free what the sleep level says."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class VllmCore:
    """A vLLM engine with one model on one device. All calls come from the thread that built it."""

    def __init__(self, settings: CoreSettings, local_rank: int = 0) -> None:
        """Start the engine; its weights are made up until the first complete load.

        Args:
            settings: Checked here before vLLM starts.
            local_rank: Index of the CUDA device among those visible to this process.

        Raises:
            MissingDependencyError: vLLM is not installed.
            ConfigError: vLLM could not run the model; see `vllm_compat.check_model`.
            EngineError: vLLM did not start.
        """
        self._device = torch.device(settings.device)
        self._sleep_level = settings.sleep_level
        self._ready = False
        self._weights_asleep = self._cache_asleep = False
        with kept_rng(self._device), own_process_group():
            vllm_compat.import_vllm()
            # A KV size in the environment would override the one in bytes.
            with plain_environment("VLLM_CPU_KVCACHE_SPACE"):
                vllm_compat.check_model(settings)
                try:
                    self._llm = vllm_compat.build_engine(settings, local_rank)
                except EngineError:
                    raise
                except Exception as error:
                    raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}") from error
            model = vllm_compat.model_of(self._llm)
            self._layout = WeightLayout.of(model, vllm_compat.parameter_shapes(self._llm))
            self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())

    def advance(self, adds: Sequence[CoreRequest], interrupted: Callable[[], bool]) -> list[Progress]:
        """Add requests and step until one finishes or `interrupted()`; return all that was sampled.

        Raises:
            EngineError: The weights are not complete, or the engine sleeps.
        """
        if not self._ready or self._weights_asleep or self._cache_asleep:
            state = "holds no complete weights; push them" if not self._ready else "sleeps; wake it"
            raise EngineError(f"the vllm engine {state} before requests are sent")
        progress: dict[int, Progress] = {}
        with kept_torch_rng(self._device):
            for request in adds:
                params = vllm_compat.sampling_params(
                    request.max_tokens, request.temperature, request.stop_ids, request.seed, request.top_p
                )
                self._llm.add_request(str(request.key), vllm_compat.token_prompt(request.tokens), params)
            finished = False
            while not finished and self._llm.has_unfinished_requests():
                finished = self._step(progress)
                if interrupted():
                    break
        return list(progress.values())

    def _step(self, progress: dict[int, Progress]) -> bool:
        """Add one step's tokens to `progress` and return whether a request finished."""
        finished = False
        for output in self._llm.step():
            sampled = output.outputs[0]
            gained = progress.setdefault(int(output.request_id), Progress(int(output.request_id)))
            gained.tokens.extend(sampled.token_ids)
            gained.logps.extend(vllm_compat.sampled_logps(sampled))
            if output.finished:
                gained.finish = str(sampled.finish_reason)
                finished = True
        return finished

    def abort(self, keys: Sequence[int]) -> None:
        """Drop requests; see `CoreHost.abort`."""
        if keys:
            self._llm.abort_request([str(key) for key in keys])

    def begin_load(self) -> None:
        """Expect every parameter anew; weights that sleep are woken, the cache is not."""
        if self._weights_asleep:
            with kept_rng(self._device):
                self._llm.wake_up(["weights"])
            self._weights_asleep = False
        self._ready = False
        self._layout.begin()

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy one parameter in. Raises EngineError for a name or shape that the model lacks."""
        self._layout.write(name, tensor)

    def finish_load(self) -> set[str]:
        """Drop the caches and return the names that were not written."""
        missing = self._layout.missing()
        self._synchronize()
        self._reset_caches()
        self._ready = not missing
        return missing

    def weights_digest(self) -> dict[str, int]:
        """Digest of each parameter as the model holds it. Raises EngineError while the weights sleep."""
        if self._weights_asleep:
            raise EngineError("the weights of the vllm engine sleep; wake it before asking for their digest")
        digests = Digests()
        for name in self._layout.readable:
            digests.add(name, self._layout.read(name))
        return digests.result()

    def sleep(self) -> None:
        """Forget the caches, and free memory as the sleep level says."""
        self._reset_caches()
        if self._sleep_level and not self._cache_asleep:
            # With asynchronous scheduling a step beyond the last token may be under way, and vLLM unmaps its memory.
            self._synchronize()
            with kept_rng(self._device):
                self._llm.sleep(self._sleep_level)
            self._weights_asleep = self._cache_asleep = True
            if self._sleep_level == 2:
                self._ready = False

    def wake(self) -> None:
        """Get back what `sleep` freed: the weights unless a load has woken them, then the cache."""
        if not self._cache_asleep:
            return
        with kept_rng(self._device):
            if self._weights_asleep:
                self._llm.wake_up(["weights"])
            self._llm.wake_up(["kv_cache"])
        self._weights_asleep = self._cache_asleep = False
        self._reset_caches()

    def close(self) -> None:
        """Shut vLLM down."""
        # Memory that sleeps is not mapped, and freeing it would unmap it once more.
        with suppress(Exception):
            self.wake()
        with kept_rng(self._device):
            self._llm.engine_core.shutdown()
            del self._llm, self._layout
            vllm_compat.release_memory()
            vllm_compat.release_pools()

    def _synchronize(self) -> None:
        """Wait for all that the device was given to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _reset_caches(self) -> None:
        """Forget keys and values of the old weights.

        Raises:
            EngineError: Requests still hold some.
        """
        for _ in range(_DRAIN_STEPS):
            if self._llm.reset_prefix_cache():
                break
            with kept_torch_rng(self._device):
                self._llm.step()
        else:
            raise EngineError("vLLM did not drop its cache of the old weights: requests still use it; abort them first")
        self._llm.reset_mm_cache()
        self._llm.reset_encoder_cache()
