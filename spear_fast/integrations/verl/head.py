"""verl's fused head on `linear_logprob`: what FusedLinearForPPO computes, without [N, V] and with float32 logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from spear_fast.errors import ConfigError
from spear_kernels import linear_logprob

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class FusedHeadPatch:
    """A replaced `FusedLinearForPPO.forward`; `undo()`, or leaving it as a context manager, restores verl's own."""

    def __init__(self, owner: type, forward: Forward) -> None:
        self._owner, self._original = owner, owner.forward
        owner.forward = forward

    def undo(self) -> None:
        """Restore verl's own method; a second call does nothing."""
        if self._original is not None:
            self._owner.forward = self._original
        self._original = None

    def __enter__(self) -> FusedHeadPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch_fused_head(*, chunk_bytes: int | None = None, backend: str = "auto") -> FusedHeadPatch:
    """Let every model that verl patched with fused_kernels_backend "torch" or "liger" use `linear_logprob`.

    All of verl's forward functions for these backends, text and vision, end in `FusedLinearForPPO.forward`, which is
    replaced, also for models patched before. Its result keeps verl's shapes: log_probs and entropy have the shape of
    input_ids, [T] or [B, T]. Both are float32 (float64 for a float64 model), where verl's entropy has the type of the
    hidden states; both carry gradients to the hidden states and the head. The temperature may also be a tensor that
    broadcasts to input_ids. chunk_bytes and backend are those of `linear_logprob`; verl's chunk_size is not read.
    verl's backend "triton" has another function and stays as it is.

    Raises:
        ConfigError: the head is replaced already. The replaced head raises it for a head that is still sharded, and for
            shapes that do not fit.
    """
    from verl.utils.experimental.torch_functional import FusedLinearForPPO  # pyright: ignore[reportMissingImports]

    owner: type = FusedLinearForPPO
    if owner.forward.__module__ == __name__:
        raise ConfigError("verl's FusedLinearForPPO is replaced already; call undo() of that patch first")

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check(hidden_states, vocab_weights, input_ids)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.expand(input_ids.shape).reshape(-1)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, H]
        ids = input_ids.reshape(-1)
        out = linear_logprob(rows, vocab_weights, ids, temperature, chunk_bytes=chunk_bytes, backend=backend)
        # Copies, since an operation in place on a view that leaves a module would lose FSDP2's hook for the backward.
        return out.logp.view(input_ids.shape).clone(), out.entropy.view(input_ids.shape).clone()

    return FusedHeadPatch(owner, forward)


def _check(hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor) -> None:
    if isinstance(vocab_weights, DTensor):
        raise ConfigError(
            f"vocab_weights is a DTensor with placements {vocab_weights.placements}: FSDP2 has wrapped lm_head by "
            "itself, and verl's fused forward reads its weight without gathering it; use actor.strategy=fsdp, or "
            "actor_rollout_ref.model.use_fused_kernels=False"
        )
    if hidden_states.shape[:-1] != input_ids.shape:
        raise ConfigError(
            f"input_ids {tuple(input_ids.shape)} must have the shape of hidden_states {tuple(hidden_states.shape)} "
            "without its last dimension"
        )
