"""Rows that were stored together: flat arrays that are never moved, however many blocks there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..types import Row

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
_ALWAYS = ("tokens", "action_mask", "old_logp", "advantages")


@dataclass(frozen=True)
class Block:
    """Some rows without padding: one flat array per field, in the types of TOKEN_TYPES and ROW_TYPES.

    13 bytes per token and 48 per row; 4 more per token if any row has a weight other than 1.
    """

    tokens: dict[str, np.ndarray]
    """Fields of tokens, [sum L] each; without "weight" all weights are 1."""
    rows: dict[str, np.ndarray]
    """Fields of rows, [R] each."""

    @classmethod
    def of_rows(cls, rows: list[Row]) -> Block:
        """Copy rows. The "advantage" of a row is the mean over its action tokens, nan if it has none.

        Raises ValueError for a row without tokens or with arrays of other lengths.
        """
        lengths = _lengths(rows)
        weighted = ("weight",) if any(row.weight is not None for row in rows) else ()
        tokens = {name: _joined(rows, name) for name in (*_ALWAYS, *weighted)}
        fields = {
            name: np.array([getattr(row, name) for row in rows], dtype=ROW_TYPES[name])
            for name in ("uid", "group_id", "version", "reward")
        }
        advantage = _means(tokens["advantages"], tokens["action_mask"], lengths)
        return cls(tokens, {**fields, "num_tokens": lengths, "advantage": advantage})

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Block:
        """Copy the arrays of all fields, which fit each other."""
        names = [name for name in TOKEN_TYPES if name != "weight" or (arrays["weight"] != 1.0).any()]
        return cls({name: arrays[name].copy() for name in names}, {name: arrays[name].copy() for name in ROW_TYPES})

    def __len__(self) -> int:
        return len(self.rows["uid"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in (*self.tokens.values(), *self.rows.values()))

    def field(self, name: str) -> np.ndarray:
        """A field of TOKEN_TYPES or ROW_TYPES."""
        if name == "weight" and name not in self.tokens:
            return np.ones(len(self.tokens["tokens"]), dtype=np.float32)
        return self.tokens[name] if name in self.tokens else self.rows[name]

    def keep(self, mask: np.ndarray) -> Block:
        """The rows where `mask`, bool [R], is True: this block if these are all."""
        if mask.all():
            return self
        of_tokens = np.repeat(mask, self.rows["num_tokens"])
        tokens = {name: array[of_tokens] for name, array in self.tokens.items()}
        return Block(tokens, {name: array[mask] for name, array in self.rows.items()})

    def take(self, indices: np.ndarray) -> list[Row]:
        """Copies of the rows at `indices`, int [K], in that order; their arrays are parts of common ones."""
        lengths = self.rows["num_tokens"][indices]
        ends = np.cumsum(lengths)
        # Each place of the result counts on from the beginning of its row in the block.
        starts = np.cumsum(self.rows["num_tokens"])[indices] - lengths
        where = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
        tokens = {name: array[where] for name, array in self.tokens.items()}
        weight = tokens.pop("weight", None)
        scalars = zip(
            *(self.rows[name][indices].tolist() for name in ("uid", "group_id", "version", "reward")), strict=True
        )
        rows = []
        for (uid, group_id, version, reward), end, length in zip(scalars, ends.tolist(), lengths.tolist(), strict=True):
            span = slice(end - length, end)
            fields = {name: array[span] for name, array in tokens.items()}
            own = None if weight is None or (weight[span] == 1.0).all() else weight[span]
            rows.append(Row(uid, group_id, version, reward=reward, weight=own, **fields))
        return rows


def _means(values: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mean over each row's places where `mask` is True, float64 [R]: `values` and `mask` [sum L], `lengths` from 1."""
    if not len(lengths):
        return np.empty(0, dtype=np.float64)
    starts = np.cumsum(lengths) - lengths
    sums = np.add.reduceat(np.where(mask, values.astype(np.float64), 0.0), starts)
    with np.errstate(invalid="ignore"):
        return sums / np.add.reduceat(mask, starts, dtype=np.int64)


def _lengths(rows: list[Row]) -> np.ndarray:
    """Tokens of each row, int64 [R]."""
    lengths = np.array([[len(getattr(row, name)) for row in rows] for name in _ALWAYS], dtype=np.int64)
    weights = np.array([len(row.tokens if row.weight is None else row.weight) for row in rows])
    wrong = (lengths != lengths[0]).any(axis=0) | (weights != lengths[0]) | (lengths[0] == 0)
    if wrong.any():
        raise refusal(rows[int(np.argmax(wrong))])
    return lengths[0]


def _joined(rows: list[Row], name: str) -> np.ndarray:
    """A field of all tokens, [sum L], copied."""
    if name == "weight":
        arrays = [np.ones(len(row.tokens), dtype=np.float32) if row.weight is None else row.weight for row in rows]
    else:
        arrays = [getattr(row, name) for row in rows]
    empty = np.empty(0, dtype=TOKEN_TYPES[name])
    return np.concatenate([empty, *arrays]).astype(TOKEN_TYPES[name], copy=False)


def refusal(row: Row) -> ValueError:
    """What is wrong with a row that cannot be stored."""
    arrays = [row.tokens, row.action_mask, row.old_logp, row.advantages]
    lengths = {len(array) for array in arrays} | ({len(row.weight)} if row.weight is not None else set())
    return ValueError(
        f"row uid={row.uid} has {row.num_action_tokens} action tokens and arrays of lengths {sorted(lengths)}; "
        "store rows with one length and at least one action token"
    )
