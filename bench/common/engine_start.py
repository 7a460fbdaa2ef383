"""Random models by size, and the engines that sample from them, for the benchmarks of rollout and weight sync."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common.shapes import published_shape
from spear_fast.rollout.hf_engine import HFEngine
from spear_fast.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spear_fast.rollout.engine import Engine

_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "1m": (128, 384, 4, 4, 2, 2048),
    "10m": (256, 1024, 8, 8, 4, 8192),
    "50m": (512, 2048, 10, 8, 4, 16_384),
    "150m": (768, 3072, 14, 12, 4, 32_768),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
}
_FILES = {"1.5b": "qwen2.5-1.5b", "7b": "qwen2.5-7b"}
SIZES = (*_SIZES, *_FILES)
"""Names of models, by about how many parameters they have when the head is tied."""
ENGINES = ("hf", "vllm", "vllm-process")
_LOGIT_SPREAD = 0.8
"""Standard deviation of the logits of a small random model; equal logits would hide wrong ones."""


def shape_of(size: str, *, tied: bool | None = None) -> dict[str, Any]:
    """Return the config.json of a Qwen2 model; `tied` None leaves the published models as they are, and ties others.

    Raises ValueError for an unknown size.
    """
    if size in _FILES:
        shape = published_shape(_FILES[size])
        return shape if tied is None else {**shape, "tie_word_embeddings": tied}
    if size not in _SIZES:
        raise ValueError(f"size={size!r} is unknown; use one of {SIZES}")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = _SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": tied is not False,
        "initializer_range": _LOGIT_SPREAD / hidden**0.5,
    }


def random_model(folder: Path, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model of the folder's shape with random weights, made and kept on `device`."""
    torch.manual_seed(derive_seed(seed, "model") % 2**63)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


@dataclass(frozen=True)
class EngineSettings:
    """What an engine of the benchmarks is built with."""

    dtype: torch.dtype
    device: torch.device
    max_model_tokens: int
    """Longest prompt plus completion, in tokens."""
    max_concurrent: int
    kv_cache_bytes: int | None = None
    """Of vLLM; None is its choice on CUDA and what `max_concurrent` needs, up to 1 GiB, on the CPU."""
    bucket_bytes: int = 256 << 20
    """Weights in flight at once on the way to another process."""
    enforce_eager: bool = False


def start_engine(name: str, folder: Path, settings: EngineSettings) -> Engine:
    """Start one of ENGINES for the folder's shape; its weights are others until the first push.

    Raises:
        ValueError: An unknown name.
        SpearError: It does not start here; MissingDependencyError if vLLM is not installed.
    """
    if name == "hf":
        return HFEngine(
            random_model(folder, settings.dtype, settings.device, seed=1),
            max_slots=settings.max_concurrent,
            max_model_tokens=settings.max_model_tokens,
        )
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown; use one of {ENGINES}")
    from spear_fast.rollout.vllm_factory import make_vllm_engine

    return make_vllm_engine(
        str(folder),
        placement="process" if name == "vllm-process" else "inproc",
        dtype=str(settings.dtype).removeprefix("torch."),
        max_model_tokens=settings.max_model_tokens,
        max_concurrent=settings.max_concurrent,
        vocab_size=AutoConfig.from_pretrained(folder).vocab_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_batched_tokens=max(8192, settings.max_model_tokens),
        enforce_eager=settings.enforce_eager,
        prefix_caching=True,
        sleep_level=0,
        deterministic=False,
        device=settings.device,
        seed=0,
        bucket_bytes=settings.bucket_bytes,
    )
