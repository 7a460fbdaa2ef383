"""Rows to a file, for a look at what made a step fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spear_fast.types import Row


def dump_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows to an .npz: `uid` [R], `length` [R], and per token, end to end, the arrays of `Row`.

    `ref_logp` and `weight` of rows that have none are NaN.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def tokens(arrays: list[np.ndarray | None]) -> np.ndarray:
        filled = [np.full(row.num_tokens, np.nan) if a is None else a for row, a in zip(rows, arrays, strict=True)]
        return np.concatenate(filled)

    np.savez(
        path,
        uid=np.array([row.uid for row in rows]),
        length=np.array([row.num_tokens for row in rows]),
        tokens=tokens([row.tokens for row in rows]),
        action_mask=tokens([row.action_mask for row in rows]),
        old_logp=tokens([row.old_logp for row in rows]),
        advantages=tokens([row.advantages for row in rows]),
        ref_logp=tokens([row.ref_logp for row in rows]),
        weight=tokens([row.weight for row in rows]),
    )
