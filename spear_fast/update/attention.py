"""Causal attention over packed sequences: each sees itself only, and no [T, T] mask exists.

Three back-ends compute it, and the plan says which. flash-attn does it natively. FlexAttention takes a block mask.
With SDPA, segments of similar length are gathered into one rectangular batch each (a bucket); padding stands to the
right, where causal attention cannot look. Where sequences share a prompt, its keys are put before those of each rest
and the causal diagonal ends in the lower right corner.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from spear_fast.batching.repeats import Repeats
from spear_fast.errors import ConfigError

from .attention_plan import AttentionPlan, Backend, FlashPlan, FlexPlan, SdpaPlan, Slots, plan_attention
from .flex import flex_packed

__all__ = ["AttentionPlan", "Backend", "choose_attention", "packed_attention", "plan_attention", "select_rows"]


def choose_attention(
    name: Literal["auto", "flash", "flex", "sdpa"], device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> Backend:
    """Return the back-end to plan for: "auto" takes flash-attn where it works, else FlexAttention on CUDA, else SDPA.

    `dtype` is the type that queries have, that of the forward pass. Raises ConfigError if the one asked for by name
    cannot work here.
    """
    device = torch.device(device)
    obstacles: dict[Backend, str | None] = {
        "flash": _flash_obstacle(device, dtype, head_dim),
        "flex": _flex_obstacle(device, head_dim),
        "sdpa": None,
    }
    if name == "auto":
        usable: list[Backend] = [backend for backend, obstacle in obstacles.items() if obstacle is None]
        return usable[0] if device.type == "cuda" else "sdpa"
    if obstacle := obstacles[name]:
        raise ConfigError(f"model.attention={name!r} cannot work: {obstacle}; set model.attention=auto")
    return cast(Backend, name)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal self-attention inside each packed sequence, differentiable.

    query [T, Hq, D], key and value [T, Hkv, D] with Hq a multiple of Hkv -> [T, Hq, D]. `scale` multiplies the scores
    (default D ** -0.5); with `window` a token sees itself and the window - 1 tokens before it.
    """
    return _attend(query, key, value, plan, scale, window)


def _by_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    if isinstance(plan, SdpaPlan):
        return _sdpa_packed(query, key, value, plan, scale, window)
    if isinstance(plan, FlexPlan):
        return flex_packed(query, key, value, plan, scale, window)
    return _flash_packed(query, key, value, plan, scale, window)


# A compiled block leaves its graph for attention: loops and shapes follow the plan, so each micro-batch would be
# compiled anew. FlexAttention is compiled by itself all the same.
_attend = cast(Callable[..., torch.Tensor], torch.compiler.disable(_by_plan))


def select_rows(source: torch.Tensor, index: torch.Tensor, repeats: Repeats = ()) -> torch.Tensor:
    """`source[index]` along the first dimension for an index int64 [N]; `repeats` are the rows it holds several times.

    The backward copies rows where torch's would add them one by one, which is much faster on a CPU; only repeated rows
    are added, in a fixed order.
    """
    return _SelectRows.apply(source, index, repeats)


def _sdpa_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SdpaPlan,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    # One split, not a slice per bucket: the backward of a slice allocates the whole.
    query_sizes = [segments * length for segments, length, _ in plan.buckets]
    key_sizes = [segments * (length + before) for segments, length, before in plan.buckets]
    slots = [
        _to_slots(tensor, places).split(sizes)
        for tensor, places, sizes in (
            (query, plan.queries, query_sizes),
            (key, plan.keys, key_sizes),
            (value, plan.keys, key_sizes),
        )
    ]
    outputs = [
        _bucket_attention(bucket, segments, before, scale, window)
        for *bucket, (segments, _, before) in zip(*slots, plan.buckets, strict=True)
    ]
    return select_rows(torch.cat(outputs), plan.queries.slot)


def _bucket_attention(
    slots: list[torch.Tensor], segments: int, before: int, scale: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one bucket: query [B * L, Hq, D], key and value [B * (before + L), Hkv, D] -> [B * L, Hq, D]."""
    query, key, value = (slot.unflatten(0, (segments, -1)).transpose(1, 2) for slot in slots)
    queries, keys, band = query.shape[2], key.shape[2], None
    if before or (window is not None and keys > window):
        band = query.new_ones((queries, keys), dtype=torch.bool).tril(before)
        band = band if window is None else band.triu(before + 1 - window)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and not _takes_fewer_keys(query.device.type, query.dtype, query.shape[-1], masked=band is not None):
        key, value = (heads.repeat_interleave(repeat, dim=1) for heads in (key, value))
        repeat = 1
    output = F.scaled_dot_product_attention(
        query, key, value, band, is_causal=band is None, scale=scale, enable_gqa=repeat > 1
    )
    return output.transpose(1, 2).flatten(0, 1)


def _takes_fewer_keys(device: str, dtype: torch.dtype, head_dim: int, *, masked: bool) -> bool:
    """Whether SDPA has a kernel for fewer heads of keys than of queries that never holds all scores.

    On CUDA that is flash attention alone, which takes no mask (torch's documentation of scaled_dot_product_attention).
    """
    return device != "cuda" or (not masked and dtype in (torch.float16, torch.bfloat16) and head_dim <= 256)


def _flash_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: FlashPlan,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    if plan.keys is not None:
        key, value = _to_slots(key, plan.keys), _to_slots(value, plan.keys)
    # With fewer queries than keys flash-attn (2.1 and later) puts the causal diagonal into the lower right corner.
    bounds = (plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys)
    span = (-1 if window is None else window - 1, 0)
    return _flash_varlen()(query, key, value, *bounds, softmax_scale=scale, causal=True, window_size=span)


def _to_slots(tokens: torch.Tensor, slots: Slots) -> torch.Tensor:
    return _ToSlots.apply(tokens, slots.token, slots.slot, slots.repeats)


class _ToSlots(torch.autograd.Function):
    """Packed tokens -> slots. Padding slots get zero gradient, so the backward is a gather too, not a scatter-add."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, slot_token: torch.Tensor, token_slot: torch.Tensor, repeats: Repeats
    ) -> torch.Tensor:
        ctx.save_for_backward(token_slot)
        ctx.repeats = repeats
        return tokens.index_select(0, slot_token)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (token_slot,) = ctx.saved_tensors
        return _add_repeats(grads[0].index_select(0, token_slot), grads[0], ctx.repeats), None, None, None


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, index: torch.Tensor, repeats: Repeats) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows, ctx.repeats = len(source), repeats
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.num_rows, *grads[0].shape[1:]))
        return _add_repeats(grad.index_copy_(0, index, grads[0]), grads[0], ctx.repeats), None, None


def _add_repeats(grad: torch.Tensor, selected: torch.Tensor, repeats: Repeats) -> torch.Tensor:
    """Set rows of `grad` that were selected several times to the sum over their places in `selected`."""
    for rows, places in repeats:
        # A sum adds in float32 also where the values are bfloat16.
        total = selected.index_select(0, places.flatten()).unflatten(0, places.shape).sum(1)
        grad.index_copy_(0, rows, total)
    return grad


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn cannot be used, or None."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA, and the policy is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, and the forward pass is in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"flash-attn takes heads of a multiple of 8 up to 256, and these have {head_dim}"
    if not find_spec("flash_attn"):
        return "the package flash-attn is not installed (pip install 'spear-fast[flash]')"
    try:
        _flash_varlen()
    except (ImportError, AttributeError, OSError) as error:
        return f"flash-attn is installed but cannot be imported ({error})"
    return None


def _flex_obstacle(device: torch.device, head_dim: int) -> str | None:
    """Why FlexAttention cannot be used, or None."""
    if device.type == "cpu":
        return "FlexAttention has no backward pass on the CPU"
    if device.type == "cuda" and not 16 <= head_dim <= 256:
        return f"FlexAttention on CUDA takes heads of 16 to 256, and these have {head_dim}"
    return None


@cache
def _flash_varlen() -> Callable[..., torch.Tensor]:
    """flash-attn's packed attention."""
    return import_module("flash_attn").flash_attn_varlen_func
