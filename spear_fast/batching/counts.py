"""Global denominators of the loss: fixed before rows are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..types import Row


class Counts(NamedTuple):
    """What a mini-batch holds, e.g. `Counts(num_tokens=4096, num_seqs=64)`."""

    num_tokens: int
    """Action tokens."""
    num_seqs: int
    """Sequences with at least one action token."""


def count(rows: Sequence[Row]) -> Counts:
    """Return the action tokens and the sequences holding any, over one mini-batch of rows."""
    per_row = [row.num_action_tokens for row in rows]
    return Counts(num_tokens=sum(per_row), num_seqs=sum(tokens > 0 for tokens in per_row))
