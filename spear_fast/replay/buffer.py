"""Unpadded storage of past rows, savable as flat arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from ..errors import CheckpointError
from ..types import Row
from .blocks import ROW_TYPES, TOKEN_TYPES, Block, refusal


class ReplayBuffer:
    """Rows in the order they were pushed, in one block per push: what is stored is not moved when rows come or go.

    `ref_logp` is not kept, since the loss of replayed rows has no KL term.
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored rows; see `Block`."""
        return sum(block.num_bytes for block in self._blocks)

    @property
    def versions(self) -> np.ndarray:
        """Policy version that sampled each row, int64 [R]."""
        return self._joined("version")

    @property
    def rewards(self) -> np.ndarray:
        """Total reward R of each row, float64 [R]."""
        return self._joined("reward")

    @property
    def advantages(self) -> np.ndarray:
        """Mean advantage over the action tokens of each row when it was pushed, float64 [R]."""
        return self._joined("advantage")

    def push(self, rows: list[Row]) -> None:
        """Append copies of `rows`. Raises ValueError for one without action tokens or with arrays of other lengths."""
        block = Block.of_rows(rows)
        # An advantage that is not a number looks like that of a row without action tokens, so the mask decides.
        suspects = [rows[i] for i in np.flatnonzero(np.isnan(block.rows["advantage"]))]
        idle = next((row for row in suspects if not row.action_mask.any()), None)
        if idle is not None:
            raise refusal(idle)
        self.add(block)

    def add(self, block: Block) -> None:
        """Append rows that have been copied already; each must have an action token."""
        if len(block):
            self._blocks.append(block)

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where `mask`, bool [R], is False."""
        kept = [block.keep(part) for block, part in zip(self._blocks, self._split(mask), strict=True)]
        self._blocks = [block for block in kept if len(block)]

    def clear(self) -> None:
        """Drop every row and free the memory."""
        self._blocks = []

    def take(self, indices: np.ndarray) -> list[Row]:
        """Return copies of the rows at `indices`, int [K], in that order; they stay stored."""
        ends = np.cumsum([len(block) for block in self._blocks])
        of_block = np.searchsorted(ends, indices, side="right")
        taken: list[Row | None] = [None] * len(indices)
        for number in np.unique(of_block):
            places = np.flatnonzero(of_block == number)
            block = self._blocks[number]
            rows = block.take(indices[places] - (ends[number] - len(block)))
            for place, row in zip(places, rows, strict=True):
                taken[place] = row
        return cast("list[Row]", taken)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of the flat arrays: fields of tokens [sum L] and of rows [R], and `offsets` int64 [R + 1]."""
        names = [name for name in (*TOKEN_TYPES, *ROW_TYPES) if name != "num_tokens"]
        offsets = np.concatenate([[0], np.cumsum(self._joined("num_tokens"))]).astype(np.int64)
        return {**{name: self._joined(name) for name in names}, "offsets": offsets}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content by `state_dict`. Raises CheckpointError, changing nothing, if the arrays do not fit."""
        _check_state(state)
        block = Block.of_arrays({**state, "num_tokens": np.diff(state["offsets"])})
        self._blocks = [block] if len(block) else []

    def _joined(self, name: str) -> np.ndarray:
        """A copy of a field of all blocks."""
        dtype = TOKEN_TYPES.get(name) or ROW_TYPES[name]
        return np.concatenate([np.empty(0, dtype=dtype), *(block.field(name) for block in self._blocks)])

    def _split(self, values: np.ndarray) -> list[np.ndarray]:
        """The part of `values`, [R], that belongs to each block."""
        return np.split(values, np.cumsum([len(block) for block in self._blocks])[:-1]) if self._blocks else []


def _check_state(state: Mapping[str, np.ndarray]) -> None:
    names = {*TOKEN_TYPES, *ROW_TYPES, "offsets"} - {"num_tokens"}
    if set(state) != names:
        raise CheckpointError(
            f"replay buffer lacks or does not know the arrays {sorted(names ^ set(state))}; resume "
            "from a checkpoint of this version"
        )
    types: dict[str, type] = {**TOKEN_TYPES, **ROW_TYPES, "offsets": np.int64}
    wrong = sorted(name for name in names if state[name].dtype != types[name] or state[name].ndim != 1)
    if wrong:
        raise CheckpointError(
            f"replay buffer arrays {wrong} are not flat or of another type; resume from a checkpoint of this version"
        )
    offsets = state["offsets"]
    row_lengths = {len(state[name]) for name in ROW_TYPES if name != "num_tokens"}
    token_lengths = {len(state[name]) for name in TOKEN_TYPES}
    fits = len(offsets) and offsets[0] == 0 and (np.diff(offsets) > 0).all()
    if not fits or row_lengths != {len(offsets) - 1} or token_lengths != {int(offsets[-1])}:
        raise CheckpointError(
            f"replay buffer has offsets for {len(offsets) - 1} rows, but arrays of {sorted(row_lengths)} rows and "
            f"{sorted(token_lengths)} tokens; the checkpoint is damaged, resume from another"
        )
