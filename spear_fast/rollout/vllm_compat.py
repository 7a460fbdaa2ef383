"""The only place that knows versions of vLLM: 0.24 to 0.33, checked by what they have rather than by number."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d as c10d

from spear_fast.errors import ConfigError, EngineError, MissingDependencyError
from spear_fast.rollout.vllm_isolation import plain_environment

OLDEST, NEWEST = (0, 24), (0, 33)
_NEEDED = {"model", "skip_tokenizer_init", "max_model_len", "max_num_seqs", "logprobs_mode", "kv_cache_memory_bytes"}
"""Engine arguments without which the engine would sample something else or take all memory."""
_TOKENS_PER_CPU_BLOCK = 128
_CPU_KV_LIMIT = 1 << 30
_pool_allocators: list[Any] = []
"""Allocators of memory pools that were released; a tensor that outlives its engine is still freed by them."""


@dataclass(frozen=True)
class CoreSettings:
    """What one vLLM engine is built from; can be sent to another process.

    Example: `CoreSettings("models/policy", "bfloat16", 4096, 256, 151665, 8 << 30, 8192, device="cuda:0")`.
    """

    model_folder: str
    """Folder with the model's config.json; weights in it are not read."""
    dtype: str
    """Name of the torch type of weights and KV cache."""
    max_model_tokens: int
    """Longest prompt plus completion, in tokens."""
    max_concurrent: int
    """Requests that run at once; more wait."""
    vocab_size: int
    """Token ids from here on are never sampled."""
    kv_cache_bytes: int | None
    """Size of the KV cache; None is what max_concurrent needs on the CPU, at most 1 GiB, and vLLM's choice on CUDA."""
    max_batched_tokens: int
    """Tokens of one forward pass."""
    enforce_eager: bool = False
    """Without CUDA graphs; always so on the CPU."""
    prefix_caching: bool = True
    sleep_level: int = 0
    """0 keeps everything while asleep, 1 parks the weights in CPU memory, 2 drops them."""
    device: str = "cpu"
    seed: int = 0


def require_package() -> None:
    """Raise MissingDependencyError if vLLM is not installed; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("vllm", "vllm", "engine.name=vllm")


def import_vllm() -> None:
    """Import vLLM with the environment it needs here.

    Raises:
        MissingDependencyError: It is not installed.
        EngineError: Its version is not one that this package knows.
    """
    require_package()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # It is of no use to processed log-probs, and without flashinfer some versions would not start.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    with plain_environment():  # the import alone limits the threads that torch.compile may use
        import vllm

    version = str(getattr(vllm, "__version__", "unknown"))
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        major, minor = -1, -1
    if not OLDEST <= (major, minor) <= NEWEST:
        raise EngineError(
            f"vLLM {version} is installed, but engine.name=vllm knows {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}; install one of these, or set engine.name=hf"
        )


def check_model(settings: CoreSettings) -> None:
    """Refuse before the engine starts what it could not run.

    Raises:
        ConfigError: The folder has no config, the vocabulary is larger than the model's, the CPU's attention lacks the
            model's head width, or weights shall sleep on the CPU.
    """
    path = Path(settings.model_folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"engine.name=vllm needs the model's config, but {path} does not exist; save the model first")
    config = _text_config(settings)
    if settings.vocab_size > config.get("vocab_size", settings.vocab_size):
        raise ConfigError(
            f"the tokenizer has {settings.vocab_size} tokens, but the model in {settings.model_folder} only "
            f"{config['vocab_size']}; resize its embedding"
        )
    if torch.device(settings.device).type != "cpu":
        return
    if settings.sleep_level:
        raise ConfigError(f"sleep level {settings.sleep_level} needs CUDA; on the CPU set memory.mode=resident")
    supported = _cpu_head_dims()
    width = _head_dim(config)
    if supported and width not in supported:
        raise ConfigError(
            f"vLLM's attention on the CPU has no heads of width {width}, only {supported}; choose "
            "model.init.hidden_size / model.init.num_heads among them, or set engine.name=hf"
        )


def build_engine(settings: CoreSettings, local_rank: int) -> Any:
    """Return a vLLM `LLMEngine` that runs in this thread, with weights made up.

    Args:
        settings: Checked by `check_model`.
        local_rank: Index of the CUDA device among those visible.

    Raises:
        EngineError: vLLM refuses, or keeps weights where they cannot be replaced.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    _keep_process_groups()
    _forget_destroyed_groups()
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if _NEEDED - known:
        raise EngineError(f"this vLLM lacks the engine arguments {sorted(_NEEDED - known)}; install {NEWEST} or older")
    wanted = {**_arguments(settings), "distributed_executor_backend": _executor_on(local_rank)}
    args = EngineArgs(**{name: value for name, value in wanted.items() if name in known})
    with _architectures_read_here(), _replaceable_weights(torch.device(settings.device).type == "cpu"):
        engine = LLMEngine.from_engine_args(args, enable_multiprocessing=False)
    packed = [name for name, parameter in model_of(engine).named_parameters() if parameter.numel() == 0]
    if packed:
        raise EngineError(f"vLLM packed {packed[:3]} where new weights cannot be written; report this with its version")
    _mask_padding(model_of(engine), settings.vocab_size)
    return engine


def model_of(engine: Any) -> nn.Module:
    """The model that an engine runs."""
    return engine.model_executor.driver_worker.model_runner.get_model()


def release_memory() -> None:
    """Give back what an engine that ended has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_pools() -> None:
    """Free what sleep mode's memory pools hold of an engine that ended awake; nothing may refer to it any more.

    vLLM keeps the pools (until 0.24 for ever): it would refuse a second engine in this process, and pools that end
    with the interpreter abort it (pytorch/pytorch#145168).
    """
    cumem = sys.modules.get("vllm.device_allocator.cumem")
    allocator = getattr(getattr(cumem, "CuMemAllocator", None), "instance", None)
    if allocator is None:
        return
    held = list(allocator.allocator_and_pools.values())
    allocator.allocator_and_pools.clear()
    # A tag has one pair of pool and allocator, in later versions a list of pairs.
    pairs = [pair for entry in held for pair in (entry if isinstance(entry, list) else [entry])]
    _pool_allocators.extend(pair[1] for pair in pairs)
    del held, pairs
    gc.collect()


def parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the policy's parameters by Hugging Face name, a tied head left out, as transformers would build it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(engine.model_config.hf_config)
    return {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}


def token_prompt(tokens: list[int]) -> Any:
    """A prompt of token ids."""
    from vllm import TokensPrompt

    return TokensPrompt(prompt_token_ids=tokens)


def sampling_params(max_tokens: int, temperature: float, stop_ids: tuple[int, ...], seed: int, top_p: float) -> Any:
    """What to sample and to return: new tokens with their log-probs, no text, no processor but those two applied."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop_token_ids": list(stop_ids),
        "seed": seed,
        "ignore_eos": True,
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA,
    }
    known = getattr(SamplingParams, "__struct_fields__", None) or {f.name for f in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{name: value for name, value in wanted.items() if name in known})


def sampled_logps(output: Any) -> list[float]:
    """Log-probs of the tokens of a `CompletionOutput`, nan where vLLM gives none."""
    entries = output.logprobs
    if entries is None:
        return [float("nan")] * len(output.token_ids)
    if hasattr(entries, "start_indices"):
        found = [
            entries.logprobs[start] if start < end else None
            for start, end in zip(entries.start_indices, entries.end_indices, strict=True)
        ]
    else:
        found = [
            entry[token].logprob if entry and token in entry else None
            for token, entry in zip(output.token_ids, entries, strict=True)
        ]
    return [float("nan") if logp is None else float(logp) for logp in found]


def _arguments(settings: CoreSettings) -> dict[str, Any]:
    cpu = torch.device(settings.device).type == "cpu"
    kv_bytes = settings.kv_cache_bytes
    wanted: dict[str, Any] = {
        "model": settings.model_folder,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_tokens,
        "max_num_seqs": settings.max_concurrent,
        "max_num_batched_tokens": max(settings.max_batched_tokens, settings.max_concurrent),
        "enforce_eager": settings.enforce_eager or cpu,
        "enable_prefix_caching": settings.prefix_caching,
        "enable_sleep_mode": settings.sleep_level > 0,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": settings.seed & 0x7FFFFFFF,
        "kv_cache_memory_bytes": kv_bytes,
    }
    if cpu:
        # A prompt computed in parts would rewind its generator, which CPU generators cannot.
        wanted["enable_chunked_prefill"] = False
        wanted["max_num_batched_tokens"] = max(wanted["max_num_batched_tokens"], settings.max_model_tokens)
        wanted["kv_cache_memory_bytes"] = kv_bytes or _cpu_kv_bytes(settings)
    elif kv_bytes is not None:
        # The cache has its size in bytes; a share of the device would be checked against what the trainer left free.
        wanted["gpu_memory_utilization"] = 0.01
    return wanted


def _text_config(settings: CoreSettings) -> dict[str, Any]:
    config = json.loads((Path(settings.model_folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def _cpu_kv_bytes(settings: CoreSettings) -> int:
    """What max_concurrent sequences of full length need, at most 1 GiB but at least two sequences."""
    config = _text_config(settings)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * heads * _head_dim(config) * getattr(torch, settings.dtype).itemsize
    blocks = -(-settings.max_model_tokens // _TOKENS_PER_CPU_BLOCK)
    per_sequence = (blocks + 1) * _TOKENS_PER_CPU_BLOCK * per_token
    return max(min(settings.max_concurrent * per_sequence, _CPU_KV_LIMIT), 2 * per_sequence)


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _cpu_head_dims() -> list[int]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return list(CPUAttentionBackend.get_supported_head_sizes())


def _executor_on(local_rank: int) -> type:
    """vLLM's one-process executor on a given CUDA device; it takes the first one otherwise."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class OneDevice(UniProcExecutor):
        def _distributed_args(self) -> tuple[str, int, int]:
            method, rank, _ = super()._distributed_args()
            return method, rank, local_rank

    return OneDevice


def _forget_destroyed_groups() -> None:
    """Let vLLM make its process groups anew if somebody destroyed all groups of this process, its own among them.

    A trainer that ends does so; vLLM would go on with the groups of its earlier engines.
    """
    from vllm.distributed import parallel_state

    world = parallel_state._WORLD
    if world is None or world.device_group in c10d._world.pg_map:
        return
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, parallel_state.GroupCoordinator):
            setattr(parallel_state, name, None)


def _keep_process_groups() -> None:
    """Stop an engine that ends, or is collected, from destroying every process group, the trainer's too.

    Its own groups of one rank stay, and the next engine of this process takes them over.
    """
    core: Any = importlib.import_module("vllm.v1.engine.core")

    core.cleanup_dist_env_and_memory = release_memory


@contextmanager
def _architectures_read_here() -> Iterator[None]:
    """Spare the process in which vLLM imports itself again to look at an architecture that it has not cached.

    It does so to keep CUDA unused in a process that will fork; this one does not.
    """
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    away = getattr(registry, "_run_in_subprocess", None)
    registry._run_in_subprocess = lambda look: look()
    try:
        yield
    finally:
        registry._run_in_subprocess = away


@contextmanager
def _replaceable_weights(cpu: bool) -> Iterator[None]:
    """On the CPU, keep linear weights as plain parameters: vLLM packs them for oneDNN and drops the original.

    Its helpers that torch.compile would compile for seconds at the first token are left uncompiled too, and
    `torch.set_num_threads`, which the worker replaces for the whole process, is put back.
    """
    if not cpu:
        yield
        return
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = nn.functional.linear

    pack, set_num_threads = utils.dispatch_cpu_unquantized_gemm, torch.set_num_threads
    utils.dispatch_cpu_unquantized_gemm = plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack
        torch.set_num_threads = set_num_threads


def _mask_padding(model: Any, vocab_size: int) -> None:
    """Give token ids from `vocab_size` on the probability 0: no tokenizer knows them."""
    compute = model.compute_logits

    def masked(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = compute(*args, **kwargs)
        if logits is not None and logits.shape[-1] > vocab_size:
            logits[..., vocab_size:] = -torch.inf
        return logits

    model.compute_logits = masked
