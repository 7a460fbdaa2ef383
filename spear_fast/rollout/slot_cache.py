"""Keys and values of the "hf" engine: which slot holds which sequence, and the attention that reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Slot:
    """What one slot holds."""

    uid: int | None = None
    """Trajectory whose keys and values are stored."""
    tokens: list[int] = field(default_factory=list)
    """The tokens they belong to."""
    released_at: int = 0
    """Clock of the last release; the smallest is given away first."""


class SlotCache:
    """Preallocated key/value storage [layers][slots, length + 1, kv_heads, head_dim].

    Slots [0, num_running) are running and contiguous, so a batch of them is a view. Slots behind them keep what
    trajectories left that wait for a tool. The last position of each slot takes the writes of padding.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        self.length = length
        self.slots = [Slot() for _ in range(num_slots)]
        self.num_running = 0
        self._clock = 0
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_free(self) -> int:
        """Slots that can still start running."""
        return len(self.slots) - self.num_running

    def acquire(self, uid: int, prompt: list[int]) -> int:
        """Make a slot running for `uid` and return how many leading tokens of `prompt` it already holds.

        The slot is the one at `num_running` before the call. At least the last token is left to compute.
        """
        idle = range(self.num_running, len(self.slots))
        index = next((i for i in idle if self.slots[i].uid == uid), None)
        if index is None:
            index = min(idle, key=lambda i: (self.slots[i].uid is not None, self.slots[i].released_at, i))
            self.slots[index].tokens = []
        self._swap(index, self.num_running)
        slot = self.slots[self.num_running]
        slot.uid = uid
        kept = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        slot.tokens = prompt[:kept]
        self.num_running += 1
        return kept

    def release(self, index: int) -> None:
        """Stop running slot `index`; the last running slot takes its place."""
        self._clock += 1
        self.slots[index].released_at = self._clock
        self.num_running -= 1
        self._swap(index, self.num_running)

    def copy(self, source: int, target: int) -> None:
        """Give slot `target` the contents of slot `source`."""
        tokens = self.slots[source].tokens
        self.slots[target].tokens = list(tokens)
        for pair in self._stores.values():
            for store in pair:
                store[target, : len(tokens)] = store[source, : len(tokens)]

    def clear(self) -> None:
        """Forget everything that is stored, for instance because the weights changed.

        Raises:
            RuntimeError: A slot is still running.
        """
        if self.num_running:
            raise RuntimeError(f"{self.num_running} requests are running; wait for them first")
        self.slots = [Slot() for _ in self.slots]

    def abandon(self) -> None:
        """Forget everything, whatever is running; the requests must have been told."""
        self.num_running = 0
        self.clear()

    def free(self) -> None:
        """Forget everything and give the memory back; the next write allocates it again."""
        self.clear()
        self._stores.clear()

    def write(self, layer: int, batch: SlotBatch, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, Lq, D] and return views [B, Hkv, Lkv, D] of all the batch may see."""
        if layer not in self._stores:
            shape = (len(self.slots), self.length + 1, key.shape[1], key.shape[3])
            self._stores[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        rows = slice(batch.first, batch.first + key.shape[0])
        index = batch.positions[:, :, None, None].expand(-1, -1, key.shape[1], key.shape[3])
        views = []
        for store, new in zip(self._stores[layer], (key, value), strict=True):
            store[rows].scatter_(1, index, new.transpose(1, 2))
            views.append(store[rows, : batch.mask.shape[-1]].transpose(1, 2))
        return views[0], views[1]

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        length = max(len(self.slots[a].tokens), len(self.slots[b].tokens))
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
        for pair in self._stores.values():
            for store in pair:
                kept = store[a, :length].clone()
                store[a, :length] = store[b, :length]
                store[b, :length] = kept


@dataclass
class SlotBatch:
    """One forward pass over the contiguous slots [first, first + B); handed to every attention layer."""

    cache: SlotCache
    first: int
    positions: Tensor  # int64 [B, Lq], where each new token goes in its slot
    mask: Tensor  # bool [B, 1, Lq, Lkv], True where a query may look


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many leading tokens two lists share."""
    if a == b[: len(a)]:
        return len(a)
    return next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -2], strict=False)) if x != y)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B, Hkv, Lq, D]
    value: Tensor,  # [B, Hkv, Lq, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slot_batch: SlotBatch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over a slot cache, in the signature of transformers' attention functions."""
    if slot_batch is None:
        raise RuntimeError("this attention serves only the engine's own forward passes")
    keys, values = slot_batch.cache.write(int(module.layer_idx), slot_batch, key, value)  # type: ignore[arg-type]
    mask = slot_batch.mask
    if sliding_window is not None:
        oldest = slot_batch.positions[:, None, :, None] - sliding_window  # [B, 1, Lq, 1]
        mask = mask & (torch.arange(mask.shape[-1], device=mask.device) > oldest)
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None
