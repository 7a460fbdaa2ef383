"""Where each packed token goes in the attention back-ends: worked out once per micro-batch, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spear_fast.batching.repeats import Repeats, find_repeats
from spear_fast.types import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["flash", "flex", "sdpa"]

# A bucket's padding costs at most this factor of its work; a smaller factor means more buckets, each a call per layer.
MAX_LENGTH_RATIO = 1.25


@dataclass(frozen=True)
class Slots:
    """A row of slots that packed tokens are copied to, and what brings their gradients back."""

    token: torch.Tensor  # int64 [slots], packed token of each slot; padding repeats a segment's last token
    slot: torch.Tensor  # int64 [T], a slot of each packed token
    repeats: Repeats = ()
    """Packed tokens that stand in several slots: a shared prompt is among the keys of all that follows it."""


@dataclass(frozen=True)
class SdpaPlan:
    """Segments of similar length, behind prompts of equal length, in rectangular batches (buckets).

    Example: lengths [4, 5] make one bucket (2, 5, 0); its 10 slots gather tokens [4, 5, 6, 7, 8, 0, 1, 2, 3, 3], and
    the packed tokens are found again at slots [5, 6, 7, 8, 0, 1, 2, 3, 4].
    """

    buckets: tuple[tuple[int, int, int], ...]
    """(segments, padded length, tokens of the prompt before each)."""
    queries: Slots
    keys: Slots


@dataclass(frozen=True)
class FlashPlan:
    """Bounds of each segment's queries and keys."""

    cu_queries: torch.Tensor  # int32 [S + 1]
    cu_keys: torch.Tensor  # int32 [S + 1]
    max_queries: int
    max_keys: int
    keys: Slots | None
    """Keys of each segment with those of the prompt before it; None where there are none."""


class Masks:
    """Block masks by window, made by the first layer that has it and read by the others.

    Not a dict: FSDP hands copies of all dicts to a block, and what one layer put into its copy the next would not see.
    """

    def __init__(self) -> None:
        self.by_window: dict[int | None, BlockMask] = {}


@dataclass(frozen=True)
class FlexPlan:
    """What a query may see, token by token; block masks are made for each window that a layer asks for."""

    segments: Segments
    segment: torch.Tensor  # int64 [T], segment of each token
    prefix: torch.Tensor  # int64 [T], segment before it, or -1
    position: torch.Tensor  # int64 [T], place in the sequence
    masks: Masks = field(default_factory=Masks)


AttentionPlan = SdpaPlan | FlashPlan | FlexPlan


def plan_attention(segments: Segments, device: torch.device | str, backend: Backend = "sdpa") -> AttentionPlan:
    """Plan the attention of a pack for one back-end, as `choose_attention` returns it.

    A segment sees itself causally, and all of the one before it.
    """
    if backend == "sdpa":
        return _plan_sdpa(segments, device)
    return _plan_flash(segments, device) if backend == "flash" else _plan_flex(segments, device)


def _plan_sdpa(segments: Segments, device: torch.device | str) -> SdpaPlan:
    length_S, start_S = segments.length, segments.start
    before_S, buckets = segments.before, list[tuple[int, int, int]]()
    queries, keys = _SlotRows(int(length_S.sum())), _SlotRows(int(length_S.sum()))
    for before in np.unique(before_S):
        candidates = np.flatnonzero(before_S == before)
        longest_first = candidates[np.argsort(-length_S[candidates], kind="stable")]
        first = 0
        while first < len(longest_first):
            longest = int(length_S[longest_first[first]])
            shortest = -(-longest // MAX_LENGTH_RATIO)
            end = int(np.searchsorted(-length_S[longest_first], -shortest, side="right"))
            members = longest_first[first:end]
            column = np.arange(longest)
            tokens = start_S[members, None] + np.minimum(column, length_S[members, None] - 1)
            real = column < length_S[members, None]
            prompt = start_S[segments.prefix[members], None] + np.arange(before)
            queries.add(tokens, real)
            keys.add(np.hstack([prompt, tokens]), np.hstack([np.ones_like(prompt, dtype=bool), real]), int(before))
            buckets.append((len(members), longest, int(before)))
            first = end
    slots = queries.slots(device)
    return SdpaPlan(tuple(buckets), slots, keys.slots(device) if segments.shared else slots)


class _SlotRows:
    """Slots in the making, segment by segment."""

    def __init__(self, num_tokens: int) -> None:
        self._tokens: list[np.ndarray] = []
        self._real: list[np.ndarray] = []
        self._slot = np.empty(num_tokens, dtype=np.int64)
        self._size = 0

    def add(self, tokens: np.ndarray, real: np.ndarray, before: int = 0) -> None:
        """Add segments [B, L]; those not `real` are padding, and the first `before` columns are the prompt's tokens."""
        own = real & (np.arange(tokens.shape[1]) >= before)
        self._slot[tokens[own]] = self._size + np.flatnonzero(own)
        self._tokens.append(tokens.ravel())
        self._real.append(real.ravel())
        self._size += tokens.size

    def slots(self, device: torch.device | str) -> Slots:
        token, real = np.concatenate(self._tokens), np.concatenate(self._real)
        # More slots than tokens are real only where prompts stand in several.
        repeats = find_repeats(np.where(real, token, -1), device) if real.sum() > len(self._slot) else ()
        return Slots(_tensor(token, device), _tensor(self._slot, device), repeats)


def _plan_flash(segments: Segments, device: torch.device | str) -> FlashPlan:
    num_keys = segments.length + segments.before
    keys = _SlotRows(int(segments.length.sum()))
    if segments.shared:
        for start, length, prefix, before in zip(
            segments.start, segments.length, segments.prefix, segments.before, strict=True
        ):
            prompt = segments.start[prefix] + np.arange(before)
            tokens = np.concatenate([prompt, start + np.arange(length)])[None]
            keys.add(tokens, np.ones_like(tokens, dtype=bool), before)
    return FlashPlan(
        cu_queries=_tensor(_bounds(segments.length), device),
        cu_keys=_tensor(_bounds(num_keys), device),
        max_queries=int(segments.length.max()),
        max_keys=int(num_keys.max()),
        keys=keys.slots(device) if segments.shared else None,
    )


def _plan_flex(segments: Segments, device: torch.device | str) -> FlexPlan:
    segment = np.repeat(np.arange(len(segments.length)), segments.length)
    position = np.arange(len(segment)) - segments.start[segment] + segments.before[segment]
    return FlexPlan(
        segments,
        segment=_tensor(segment, device),
        prefix=_tensor(segments.prefix[segment], device),
        position=_tensor(position, device),
    )


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
