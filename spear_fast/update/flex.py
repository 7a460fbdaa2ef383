"""Packed attention by FlexAttention: compiled on CUDA, and plain (with a [T, T] score matrix) elsewhere, for tests."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spear_fast.types import Segments

from .attention_plan import FlexPlan

BLOCK = 128
"""Tokens along a side of a block of the mask, FlexAttention's default."""


def flex_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: FlexPlan,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention [T, Hq, D] of query [T, Hq, D], key and value [T, Hkv, D]; see `packed_attention`."""
    masks = plan.masks.by_window
    if window not in masks:
        masks[window] = block_mask(plan, window)
    attend = _compiled() if query.is_cuda else _plain
    tensors = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    gqa = query.shape[1] != key.shape[1]
    return attend(*tensors, block_mask=masks[window], scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


def block_mask(plan: FlexPlan, window: int | None) -> BlockMask:
    """The mask of a plan, with `visible` for single tokens and the blocks that hold any or only visible pairs."""
    segment, prefix, position = plan.segment, plan.prefix, plan.position

    def visible(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        causal = (segment[q] == segment[k]) & (q >= k)
        seen = causal | (segment[k] == prefix[q])
        return seen if window is None else seen & (position[q] - position[k] < window)

    some, every = _blocks(plan.segments, window)
    tables = [_table(blocks, plan.segment.device) for blocks in (some & ~every, every)]
    num_tokens = len(plan.segment)
    return BlockMask.from_kv_blocks(
        *tables[0], *tables[1], BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(num_tokens, num_tokens)
    )


def _blocks(segments: Segments, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks [Q, K] may hold a visible pair, and which hold no other."""
    num_tokens = int(segments.length.sum())
    segment = np.repeat(np.arange(len(segments.length)), segments.length)
    side = -(-num_tokens // BLOCK)
    some, every = np.zeros((side, side), dtype=bool), np.zeros((side, side), dtype=bool)
    first_token = np.arange(side) * BLOCK
    first, last = segment[first_token], segment[np.minimum(first_token + BLOCK, num_tokens) - 1]
    lower = np.tri(side, dtype=bool)
    some |= lower & (last[None, :] >= first[:, None])
    for q in range(side):
        for prompt in np.unique(segments.prefix[first[q] : last[q] + 1]):
            if prompt >= 0:
                some[q] |= (first <= prompt) & (prompt <= last)
    if window is None:
        pure = (first == last) & (first_token + BLOCK <= num_tokens)
        same = (first[:, None] == first[None, :]) & np.tri(side, k=-1, dtype=bool)
        every |= pure[:, None] & pure[None, :] & (same | (segments.prefix[first][:, None] == first[None, :]))
    return some, every


def _table(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Number [1, 1, Q] and places [1, 1, Q, K] of the True blocks in each row, as FlexAttention takes them."""
    places = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=1).astype(np.int32)
    return tuple(torch.from_numpy(array)[None, None].to(device, non_blocking=True) for array in (counts, places))


def _plain(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        return flex_attention(*args, **kwargs)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
