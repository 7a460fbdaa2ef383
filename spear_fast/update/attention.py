"""Causal attention over packed sequences: each sees itself only, and no [T, T] mask exists.

flash-attn does it natively. Without it, sequences of similar length are gathered into one rectangular batch each
(a bucket). Padding stands to the right of a sequence, where causal attention cannot look, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# A bucket's padding costs at most this factor of its work; a smaller factor means more buckets, each a call per layer.
MAX_LENGTH_RATIO = 1.25


@dataclass(frozen=True)
class AttentionPlan:
    """Where each packed token goes, made once per micro-batch and used by every layer.

    Example: lengths [4, 5] make one bucket (2, 5); its 10 slots gather tokens [4, 5, 6, 7, 8, 0, 1, 2, 3, 3], and the
    packed tokens are found again at slots [5, 6, 7, 8, 0, 1, 2, 3, 4].
    """

    cu_seqlens: torch.Tensor  # int32 [R + 1]
    max_length: int
    buckets: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each bucket."""
    slot_token: torch.Tensor  # int64 [S], packed token of each slot; padding repeats the sequence's last token
    token_slot: torch.Tensor  # int64 [T], slot of each packed token


def plan_attention(lengths: Sequence[int], device: torch.device | str) -> AttentionPlan:
    """Plan the attention of sequences packed in this order; `lengths` are tokens, each at least 1."""
    length_R = np.asarray(lengths, dtype=np.int64)
    offset_R = np.concatenate([[0], np.cumsum(length_R)])
    longest_first = np.argsort(-length_R, kind="stable")
    token_slot = np.empty(offset_R[-1], dtype=np.int64)
    buckets, slot_tokens, first, num_slots = [], [], 0, 0
    while first < len(length_R):
        longest = int(length_R[longest_first[first]])
        shortest = -(-longest // MAX_LENGTH_RATIO)
        end = int(np.searchsorted(-length_R[longest_first], -shortest, side="right"))
        members = longest_first[first:end]
        column = np.arange(longest)
        tokens = offset_R[members, None] + np.minimum(column, length_R[members, None] - 1)
        real = column < length_R[members, None]
        token_slot[tokens[real]] = num_slots + np.flatnonzero(real)
        buckets.append((len(members), longest))
        slot_tokens.append(tokens.ravel())
        first, num_slots = end, num_slots + tokens.size
    return AttentionPlan(
        cu_seqlens=torch.from_numpy(offset_R.astype(np.int32)).to(device, non_blocking=True),
        max_length=int(length_R.max()),
        buckets=tuple(buckets),
        slot_token=torch.from_numpy(np.concatenate(slot_tokens)).to(device, non_blocking=True),
        token_slot=torch.from_numpy(token_slot).to(device, non_blocking=True),
    )


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
    flash = _flash_varlen()
    if flash is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        lengths = (plan.cu_seqlens, plan.cu_seqlens, plan.max_length, plan.max_length)
        span = (-1 if window is None else window - 1, 0)
        return flash(query, key, value, *lengths, softmax_scale=scale, causal=True, window_size=span)
    # One split, not a slice per bucket: the backward of a slice allocates the whole.
    sizes = [sequences * length for sequences, length in plan.buckets]
    slots = [_ToSlots.apply(tensor, plan.slot_token, plan.token_slot).split(sizes) for tensor in (query, key, value)]
    outputs = [
        _bucket_attention(bucket, sequences, scale, window)
        for *bucket, (sequences, _) in zip(*slots, plan.buckets, strict=True)
    ]
    return select_rows(torch.cat(outputs), plan.token_slot)


def select_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`source[index]` along the first dimension for an index int64 [N] without repeats.

    The backward copies rows where torch's would add them one by one, which is much faster on a CPU.
    """
    return _SelectRows.apply(source, index)


def _bucket_attention(
    slots: list[torch.Tensor], sequences: int, scale: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one bucket: query, key and value [B * L, heads, D] -> [B * L, Hq, D]."""
    query, key, value = (slot.unflatten(0, (sequences, -1)).transpose(1, 2) for slot in slots)
    length, band = query.shape[2], None
    if window is not None and length > window:
        band = query.new_ones((length, length), dtype=torch.bool).tril().triu(1 - window)
    output = F.scaled_dot_product_attention(
        query, key, value, band, is_causal=band is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).flatten(0, 1)


class _ToSlots(torch.autograd.Function):
    """Packed tokens -> slots. Padding slots get zero gradient, so the backward is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, slot_token: torch.Tensor, token_slot: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_slot)
        return tokens.index_select(0, slot_token)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_slot,) = ctx.saved_tensors
        return grads[0].index_select(0, token_slot), None, None


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(source)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.num_rows, *grads[0].shape[1:]))
        return grad.index_copy_(0, index, grads[0]), None


@cache
def _flash_varlen() -> Callable[..., torch.Tensor] | None:
    """flash-attn's packed attention, if the package is installed."""
    return import_module("flash_attn").flash_attn_varlen_func if find_spec("flash_attn") else None
