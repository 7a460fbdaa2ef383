"""Bytes that training takes on one GPU: what lies there between steps, and what a micro-batch adds at its peak."""

from __future__ import annotations

from dataclasses import dataclass

from spear_fast.config.schema import RunConfig

from .shapes import DTYPE_BYTES, ModelShape

Items = dict[str, int]
"""Bytes by what they are for, in the order of a table."""

MASTER_BYTES = 4
MOMENT_BYTES = 8
"""AdamW's two moments of a parameter."""
GPU_CHUNK_BYTES, CPU_CHUNK_BYTES = 1 << 30, 64 << 20
"""What `update.head_chunk_mib=null` means to the loss operators."""


@dataclass(frozen=True)
class Training:
    """The trainer's side of the plan for one rank of `num_ranks`.

    FSDP2 keeps float32 masters, gradients and moments in shards, and gathers a block (and the root: embedding, last
    norm, head) in the type of the forward pass for as long as it is used. A lone float32 rank is not wrapped: its
    weights are the masters.
    """

    shape: ModelShape
    config: RunConfig
    num_ranks: int
    on_cpu: bool = False

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the weights."""
        return max(1, self.num_ranks // self.config.parallel.replicate)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 wraps the policy."""
        return self.num_ranks > 1 or self.config.needs_sharding

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the forward and backward pass."""
        return DTYPE_BYTES[self.config.model.dtype]

    @property
    def adapter_parameters(self) -> int:
        """Parameters of the adapters, 0 without LoRA."""
        lora = self.config.model.lora
        return self.shape.lora_parameters(lora.rank, lora.targets) if lora.rank else 0

    @property
    def trained_parameters(self) -> int:
        """Parameters with a gradient."""
        return self.adapter_parameters or self.shape.num_parameters

    def master_weights(self) -> int:
        """Weights of a rank between steps: float32, but those beside adapters, which are frozen, in the pass's type."""
        adapters = self.adapter_parameters
        model = (self.itemsize if adapters else MASTER_BYTES) * self.shape.num_parameters
        return (model + MASTER_BYTES * adapters) // self.num_shards

    def reference_weights(self) -> int:
        """Frozen weights of the policy that a KL term pulls to, spread like those that are trained."""
        return self.itemsize * self.shape.num_parameters // self.num_shards

    def optimizer_state(self) -> int:
        """AdamW's moments of a rank."""
        return MOMENT_BYTES * self.trained_parameters // self.num_shards

    def gradients(self) -> int:
        """Float32 gradients of a rank between micro-batches; whole ones where they are reduced once a step."""
        shards = self.num_shards if self.config.parallel.reduce_gradients == "micro_batch" else 1
        return MASTER_BYTES * self.trained_parameters // shards

    def micro_batch(self) -> Items:
        """What a micro-batch of `update.token_budget` tokens adds, at the greater of two moments.

        When the backward pass begins, all activations and the gradients behind the head are there; when it ends, the
        activations are gone and the root's gradients are reduced.
        """
        begin = {
            "activations": self.activations() + self._backward_workspace(),
            "gathered weights": self._gathered_weights(),
            "gradients being reduced": self._reduced(self._trained_per_block),
            "head: logits, gradients": self._head(),
        }
        end = {
            **begin,
            "activations": self._block_activations() + self._backward_workspace(),
            "gradients being reduced": self._reduced(max(self._trained_root, self._trained_per_block)),
            "head: logits, gradients": 0,
        }
        return max(begin, end, key=lambda items: sum(items.values()))

    def activations(self) -> int:
        """Bytes that the forward pass of a full micro-batch keeps for the backward pass.

        With activation checkpointing that is the input of each block, and everything of the one block that is
        computed again; otherwise everything of all blocks. Either way the last norm comes on top.
        """
        tokens, width = self.config.update.token_budget, self.shape.hidden_size
        if self.config.parallel.activation_checkpointing:
            blocks = self.shape.num_layers * self.itemsize * tokens * width + self._block_activations()
        else:
            blocks = self.shape.num_layers * self._block_activations()
        return blocks + tokens * self._norm_bytes(width)

    def _block_activations(self) -> int:
        return self.config.update.token_budget * self.block_bytes_per_token()

    def block_bytes_per_token(self) -> int:
        """Activations of one block, for one token, as torch's autograd keeps them.

        With e bytes a number, width H, feed-forward I, all query heads A and all key heads K wide:
        norms (2 or 4): 4 H (its input in float32) + e H (normalised) + e H (scaled: the input of the next matrix);
        attention: e (3 A + 2 K) for queries, keys, values, output and the output in packed order, 4 for the sum of
        each head's exponentials; norms of queries and keys: (4 + e) (A + K); feed-forward: 4 e I (gate, its SiLU, up,
        product). Liger's norms keep 2 e H, its SwiGLU 3 e I. Nothing grows with the square of a sequence; without
        flash-attn, sequences of uneven length add at most a quarter to queries, keys, values and output.
        """
        shape, e = self.shape, self.itemsize
        queries, keys = shape.query_width, shape.kv_width
        liger = self.config.model.liger == "on"
        norms = shape.norms_per_block * (self._norm_bytes(shape.hidden_size) + e * shape.hidden_size)
        attention = e * (3 * queries + 2 * keys) + 4 * shape.num_heads
        if shape.qk_norm:
            attention += self._norm_bytes(queries + keys)
        return norms + attention + (3 if liger else 4) * e * shape.intermediate_size

    def _norm_bytes(self, width: int) -> int:
        """What a norm keeps of one token beside its output."""
        return (self.itemsize if self.config.model.liger == "on" else 4 + self.itemsize) * width

    def _backward_workspace(self) -> int:
        """Gradients that exist at once inside a block: of the feed-forward's three wide tensors and of two narrow."""
        wide = 3 * self.shape.intermediate_size + 2 * self.shape.hidden_size
        return self.itemsize * self.config.update.token_budget * wide

    def _gathered_weights(self) -> int:
        """Root and two blocks, one in use and one on its way; all blocks where they are kept."""
        if not self.is_sharded:
            return 0
        parallel = self.config.parallel
        kept = not parallel.reshard_after_forward or parallel.reduce_gradients == "step"
        blocks = self.shape.num_layers if kept else min(2, self.shape.num_layers)
        return self.itemsize * (self.shape.root_parameters + blocks * self.shape.block_parameters)

    @property
    def _trained_root(self) -> int:
        return 0 if self.adapter_parameters else self.shape.root_parameters

    @property
    def _trained_per_block(self) -> int:
        return (self.trained_parameters - self._trained_root) // self.shape.num_layers

    def _reduced(self, parameters: int) -> int:
        """A group's whole gradients and their float32 copy for the reduction, beside the next block's gradients."""
        if not self.is_sharded or self.config.parallel.reduce_gradients == "step":
            return self.itemsize * self._trained_per_block if self.is_sharded else 0
        return (self.itemsize + MASTER_BYTES) * parameters + self.itemsize * self._trained_per_block

    def _head(self) -> int:
        """A chunk of logits with their gradient, hidden states and their gradient, the float32 gradient of the head.

        Every token counts as sampled. The gradient of the head is rounded to the head's type at the end.
        """
        update, shape = self.config.update, self.shape
        chunk = update.head_chunk_bytes or (CPU_CHUNK_BYTES if self.on_cpu else GPU_CHUNK_BYTES)
        logits = min(chunk, update.token_budget * shape.vocab_size * (4 + self.itemsize))
        hidden = 2 * self.itemsize * update.token_budget * shape.hidden_size
        rounded = self.itemsize if self.itemsize < MASTER_BYTES else 0
        weight = 0 if self.adapter_parameters else (MASTER_BYTES + rounded) * shape.embedding_parameters
        return logits + hidden + weight
