"""Settings of where and how a run is executed: the rollout engine, the ranks, the memory of a GPU."""

from __future__ import annotations

from typing import Literal

from .section import NonNegativeFloat, Positive, PositiveFloat, Section


class EngineConfig(Section):
    """What samples tokens. `engine=vllm` is short for `engine.name=vllm`."""

    name: Literal["hf", "vllm"] = "hf"
    """"hf" is transformers with continuous batching, embedded; "vllm" is the production engine, colocated."""
    placement: Literal["inproc", "process"] = "inproc"
    """vLLM in the trainer's process, or in a process of its own that shares no GIL with tools and trainer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the engine's weights; "auto" takes model.dtype."""
    kv_cache_mib: Positive | None = None
    """Memory of vLLM's KV cache, in MiB; None lets the memory plan size it."""
    max_batched_tokens: Positive = 8192
    """Tokens of one forward pass of vLLM, prompts and sampled ones together."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs; always so on the CPU."""
    prefix_caching: bool = True
    """Keep the KV cache of prompts between requests; it is dropped whenever weights change."""
    bucket_mib: Positive = 1024
    """Weights in flight at once during a sync, in MiB."""
    verify_weights: Literal["always", "first", "never"] = "always"
    """When to compare a digest of the engine's weights with the trainer's after a sync; a difference ends the run."""


class ParallelConfig(Section):
    """How the policy is spread over ranks (FSDP2); ranks are started by torchrun, one per GPU."""

    replicate: Positive = 1
    """Copies of the sharded model (HSDP); must divide the number of ranks. 1 shards over all of them."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward."""
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    """When gradients are reduced over ranks: "step" communicates once but keeps a whole gradient on each rank."""
    cpu_offload: bool = False
    """Keep master weights, gradients and optimizer state in the memory of the CPU."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass."""
    timeout_s: PositiveFloat = 1800.0
    """Longest wait for another rank, in seconds, before the run ends with an error."""


class MemoryConfig(Section):
    """How trainer and engine share a GPU."""

    mode: Literal["auto", "resident", "sleep1", "sleep2", "offload"] = "auto"
    """"resident" keeps everything; "sleep1" frees the engine's KV cache and parks its weights in CPU memory while
    training; "sleep2" drops both; "offload" also moves the trainer to the CPU during rollouts. "auto" takes the
    first that fits."""
    gpu_gib: PositiveFloat | None = None
    """Memory of one GPU to plan for, in GiB; None reads it from the device."""
    reserve_gib: NonNegativeFloat = 4.0
    """Kept free for the CUDA context, NCCL and fragmentation, in GiB."""
