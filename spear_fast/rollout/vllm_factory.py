"""Starts a vLLM engine in the placement that is asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import torch

from spear_fast.rollout import vllm_compat
from spear_fast.rollout.vllm_compat import CoreSettings
from spear_fast.rollout.vllm_core import CoreHost, CoreRequest, Progress, VllmCore
from spear_fast.rollout.vllm_engine import VllmEngine
from spear_fast.rollout.vllm_process import CoreProcess


class InlineCore:
    """A core in this process; see `CoreHost`."""

    def __init__(self, settings: CoreSettings) -> None:
        device = torch.device(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device belongs to the thread
        self._core = VllmCore(settings, local_rank=device.index or 0)
        self._interrupted = threading.Event()
        self.alive = True
        self.rearm, self.interrupt = self._interrupted.clear, self._interrupted.set
        self.abort, self.begin_load, self.write = self._core.abort, self._core.begin_load, self._core.write
        self.finish_load, self.weights_digest = self._core.finish_load, self._core.weights_digest
        self.sleep, self.wake, self.close = self._core.sleep, self._core.wake, self._core.close

    def advance(self, adds: Sequence[CoreRequest]) -> list[Progress]:
        """Add requests and step; see `CoreHost.advance`."""
        return self._core.advance(adds, self._interrupted.is_set)


def make_vllm_engine(
    model_folder: str,
    *,
    placement: Literal["inproc", "process"],
    dtype: str,
    max_model_tokens: int,
    max_concurrent: int,
    vocab_size: int,
    kv_cache_bytes: int | None,
    max_batched_tokens: int,
    enforce_eager: bool,
    prefix_caching: bool,
    sleep_level: Literal[0, 1, 2],
    deterministic: bool,
    device: torch.device,
    seed: int,
    bucket_bytes: int = 1 << 30,
) -> VllmEngine:
    """Start a vLLM engine of one rank; weights must be pushed before the first request.

    Args:
        model_folder: Folder with the model's config.json; no weights are read.
        placement: In this process, or in one of its own.
        dtype: Name of the torch type of the weights.
        max_model_tokens: Longest prompt plus completion, in tokens.
        max_concurrent: Requests that run at once.
        vocab_size: Token ids from here on, which pad the vocabulary, are never sampled.
        kv_cache_bytes: Size of the KV cache; see `CoreSettings`.
        max_batched_tokens: Tokens of one forward pass.
        enforce_eager: No CUDA graphs.
        prefix_caching: Keep the cache of prompts between requests, until weights change.
        sleep_level: What `sleep` frees; see `CoreSettings`.
        deterministic: Advance only when every participant waits.
        device: The rank's device.
        seed: Of vLLM; requests bring their own.
        bucket_bytes: With placement "process", weights in flight at once, in bytes.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: vLLM cannot run the model here; see `vllm_compat.check_model`.
        EngineError: vLLM does not start.
    """
    vllm_compat.require_package()
    settings = CoreSettings(
        model_folder=model_folder,
        dtype=dtype,
        max_model_tokens=max_model_tokens,
        max_concurrent=max_concurrent,
        vocab_size=vocab_size,
        kv_cache_bytes=kv_cache_bytes,
        max_batched_tokens=max_batched_tokens,
        enforce_eager=enforce_eager,
        prefix_caching=prefix_caching,
        sleep_level=sleep_level,
        device=str(device),
        seed=seed,
    )

    def make_core() -> CoreHost:
        return InlineCore(settings) if placement == "inproc" else CoreProcess(settings, bucket_bytes=bucket_bytes)

    return VllmEngine(make_core, max_model_tokens=max_model_tokens, vocab_size=vocab_size, deterministic=deterministic)
