"""Unpadded storage of past rows in flat arrays, savable as they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import CheckpointError
from ..types import Row
from .columns import Column

TOKEN_TYPES = {
    "tokens": np.int32,
    "action_mask": np.bool_,
    "old_logp": np.float32,
    "advantages": np.float32,
    "weight": np.float32,
}
ROW_TYPES = {
    "uid": np.int64,
    "group_id": np.int64,
    "version": np.int64,
    "num_tokens": np.int64,
    "reward": np.float64,
    "advantage": np.float64,
}


class ReplayBuffer:
    """Rows in the order they were pushed: one flat array per field, 17 bytes per token and 48 per row.

    `ref_logp` is not kept, since the loss of replayed rows has no KL term.
    """

    def __init__(self) -> None:
        self._tokens = {name: Column(dtype) for name, dtype in TOKEN_TYPES.items()}
        self._rows = {name: Column(dtype) for name, dtype in ROW_TYPES.items()}

    def __len__(self) -> int:
        return len(self._rows["uid"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored rows."""
        return sum(column.num_bytes for column in (*self._tokens.values(), *self._rows.values()))

    @property
    def versions(self) -> np.ndarray:
        """Policy version that sampled each row, int64 [R]."""
        return self._rows["version"].values

    @property
    def rewards(self) -> np.ndarray:
        """Total reward R of each row, float64 [R]."""
        return self._rows["reward"].values

    @property
    def advantages(self) -> np.ndarray:
        """Mean advantage over the action tokens of each row when it was pushed, float64 [R]."""
        return self._rows["advantage"].values

    def push(self, rows: list[Row]) -> None:
        """Append copies of `rows`. Raises ValueError for one without action tokens or with arrays of other lengths."""
        if not rows:
            return
        for row in rows:
            _check(row)
        for name in ("tokens", "action_mask", "old_logp", "advantages"):
            self._tokens[name].extend(np.concatenate([getattr(row, name) for row in rows]))
        self._tokens["weight"].extend(np.concatenate([_weight(row) for row in rows]))
        for name in ("uid", "group_id", "version", "num_tokens", "reward"):
            self._rows[name].extend(np.array([getattr(row, name) for row in rows], dtype=ROW_TYPES[name]))
        self._rows["advantage"].extend(np.array([mean_advantage(row) for row in rows], dtype=np.float64))

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where `mask`, bool [R], is False."""
        if mask.all():
            return
        token_mask = np.repeat(mask, self._rows["num_tokens"].values)
        for column in self._tokens.values():
            column.keep(token_mask)
        for column in self._rows.values():
            column.keep(mask)

    def clear(self) -> None:
        """Drop every row and free the memory."""
        self.keep(np.zeros(len(self), dtype=bool))

    def take(self, indices: np.ndarray) -> list[Row]:
        """Return copies of the rows at `indices`, int [K], in that order; they stay stored."""
        offsets = self._offsets()
        return [self._row(int(index), slice(offsets[index], offsets[index + 1])) for index in indices]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of the flat arrays: fields of tokens [sum L] and of rows [R], and `offsets` int64 [R + 1]."""
        columns = {**self._tokens, **self._rows}
        state = {name: column.values.copy() for name, column in columns.items() if name != "num_tokens"}
        return {**state, "offsets": self._offsets()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content by `state_dict`. Raises CheckpointError, changing nothing, if the arrays do not fit."""
        _check_state(state)
        arrays = {**state, "num_tokens": np.diff(state["offsets"])}
        for columns, types in ((self._tokens, TOKEN_TYPES), (self._rows, ROW_TYPES)):
            for name, dtype in types.items():
                columns[name] = Column(dtype)
                columns[name].extend(arrays[name])

    def _offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._rows["num_tokens"].values)]).astype(np.int64)

    def _row(self, index: int, span: slice) -> Row:
        fields = {name: column.values[span].copy() for name, column in self._tokens.items()}
        weight = fields.pop("weight")
        return Row(
            uid=int(self._rows["uid"].values[index]),
            group_id=int(self._rows["group_id"].values[index]),
            version=int(self._rows["version"].values[index]),
            reward=float(self._rows["reward"].values[index]),
            weight=None if (weight == 1.0).all() else weight,
            **fields,
        )


def mean_advantage(row: Row) -> float:
    """Return the mean advantage over the action tokens of `row`, which has at least one."""
    return float(row.advantages[row.action_mask].mean(dtype=np.float64))


def _weight(row: Row) -> np.ndarray:
    return np.ones(row.num_tokens, dtype=np.float32) if row.weight is None else row.weight


def _check(row: Row) -> None:
    lengths = {len(row.tokens), len(row.action_mask), len(row.old_logp), len(row.advantages), len(_weight(row))}
    if len(lengths) != 1 or not row.action_mask.any():
        raise ValueError(
            f"row uid={row.uid} has {row.num_action_tokens} action tokens and arrays of lengths {sorted(lengths)}; "
            "store rows with one length and at least one action token"
        )


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
