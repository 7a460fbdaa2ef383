"""The policy over several ranks: FSDP2 around each block and around the rest, with sums of gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from spear_fast.errors import ConfigError

if TYPE_CHECKING:
    from spear_fast.config.machine import ParallelConfig
    from spear_fast.dist import Ranks

    from .model import PackedModel


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a Hugging Face model, in order. Raises ConfigError if it does not name them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} does not say what its blocks are (_no_split_modules={sorted(names)}), so it can "
            "neither be sharded nor compiled; use one of the Qwen2, Qwen3, Llama, Mistral or Gemma families"
        )
    return blocks


def shard(
    policy: PackedModel, ranks: Ranks, parallel: ParallelConfig, dtype: torch.dtype, *, compile_blocks: bool = False
) -> None:
    """Spread the policy over `ranks`, in place: float32 master weights, forward and backward passes in `dtype`.

    Frozen weights are kept in `dtype`. Without `ranks.mesh` all stay as they are. Names of parameters never change.
    Every rank must hold the same weights; each keeps its part, so leave the model on the CPU. Adapters come before, the
    optimizer after.
    """
    blocks = decoder_blocks(policy.model)
    for block in blocks:
        if compile_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
        if parallel.activation_checkpointing:
            # Around the compiled block: inside, its eager attention would keep the whole block from being compiled.
            block.forward = _recomputed(block.forward)
    if ranks.mesh is None:
        return
    settings: dict[str, Any] = {
        "mesh": ranks.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
        if parallel.cpu_offload
        else OffloadPolicy(),
    }
    for block in blocks:
        # One block at a time, so that the float32 copy of the whole model never exists.
        _to_masters(block, dtype)
        fully_shard(block, reshard_after_forward=parallel.reshard_after_forward, **settings)
    _to_masters(policy.root, dtype)
    fully_shard(policy.root, **settings)
    for module in _sharded(policy.root):
        # Losses are divided by the counts of all ranks already, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    policy.ranks, policy.rests_on_cpu = ranks, parallel.cpu_offload


def set_reduction(policy: PackedModel, *, now: bool) -> None:
    """Whether the next backward passes reduce gradients over ranks, or keep them whole for a later one that does."""
    if isinstance(policy.root, FSDPModule):
        policy.root.set_requires_gradient_sync(now)
        policy.root.set_reshard_after_backward(now)


def reshard(root: nn.Module) -> None:
    """Free the gathered weights of all modules under `root`, so that their parameters are the shards."""
    for module in _sharded(root):
        module.reshard()


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _to_masters(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is not sharded yet into its type: trained weights float32, which alone shows small steps."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            tensor.data = tensor.data.to(dtype if frozen else torch.float32)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose activations are computed again in the backward pass."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed
