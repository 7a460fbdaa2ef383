"""Bytes that the rollout engine takes on one GPU: weights, workspace, and what its KV cache needs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from spear_fast.config.schema import RunConfig

from .shapes import DTYPE_BYTES, ModelShape

BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's cache on the CPU; those on CUDA are smaller."""


@dataclass(frozen=True)
class EngineNeeds:
    """The engine's side of the plan: each rank has an engine of its own with a whole copy of the weights."""

    shape: ModelShape
    config: RunConfig
    num_ranks: int

    @property
    def dtype(self) -> str:
        """Type of weights and cache."""
        return self.config.engine_dtype

    def weights(self) -> int:
        """A whole copy; adapters are merged into it."""
        return self.shape.num_parameters * DTYPE_BYTES[self.dtype]

    def workspace(self) -> int:
        """Activations of one forward pass, and logits with their log-probs, both float32, of every running request.

        An estimate: `max_batched_tokens` tokens, of which a block holds its residual stream, its queries, keys and
        values, and the two wide tensors of the feed-forward.
        """
        shape, engine = self.shape, self.config.engine
        widths = 3 * shape.hidden_size + shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate_size
        tokens = engine.max_batched_tokens if engine.name == "vllm" else self.concurrent
        return tokens * widths * DTYPE_BYTES[self.dtype] + 2 * 4 * self.concurrent * shape.vocab_size

    @property
    def sharded_over(self) -> int:
        """Ranks that hold one copy of the trained weights together."""
        return self.num_ranks // self.config.parallel.replicate

    @property
    def trajectories(self) -> int:
        """Trajectories of one rank in one training step."""
        rollout = self.config.rollout
        prompts = rollout.prompts_per_step * (rollout.oversample if rollout.mode == "partial" else 1.0)
        return ceil(prompts * rollout.group_size / self.num_ranks)

    @property
    def concurrent(self) -> int:
        """Trajectories of one rank in flight at once."""
        return min(self.config.rollout.max_concurrent, self.trajectories)

    def cache_of(self, trajectories: int) -> int:
        """KV cache of so many trajectories of the greatest length, in whole blocks, and the one that vLLM keeps."""
        blocks = trajectories * ceil(self.config.rollout.max_tokens / BLOCK_TOKENS) + 1
        return blocks * BLOCK_TOKENS * self.shape.kv_bytes_per_token(self.dtype)

    def fixed_cache(self) -> int | None:
        """Bytes of the cache where they are not for the plan to choose, else None.

        The "hf" engine has one slot of the greatest length for each of `rollout.max_concurrent` trajectories.
        """
        if self.config.engine.name == "hf":
            slots = self.config.rollout.max_concurrent
            return slots * (self.config.rollout.max_tokens + 1) * self.shape.kv_bytes_per_token(self.dtype)
        mib = self.config.engine.kv_cache_mib
        return None if mib is None else mib << 20

    def asleep(self) -> int:
        """Weights that stay on the device while the engine sleeps: vLLM's leave it, those of "hf" do not."""
        return self.weights() if self.config.engine.name == "hf" else 0

    def bucket(self) -> int:
        """Weights in flight during a sync; one rank alone copies parameter by parameter.

        Several ranks gather a bucket, to which each sends its shard; an engine in its own process reads from another.
        """
        whole = self.weights()
        bucket = min(whole, self.config.engine.bucket_mib << 20)
        outside = bucket if self.config.engine.placement == "process" else 0
        if self.num_ranks == 1:
            return min(whole, self.shape.embedding_parameters * DTYPE_BYTES[self.dtype]) + outside
        return bucket + bucket // self.sharded_over + outside
