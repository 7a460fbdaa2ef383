"""Rows that begin with the same prompt, which one micro-batch can compute once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..types import Row


class Bundle(NamedTuple):
    """Rows with equal tokens before their first action token, e.g. `Bundle(prefix=60, members=[0, 3, 4])`."""

    prefix: int
    """Tokens in common, none of them an action; 0 where there is nothing to share."""
    members: list[int]
    """Places of the rows, ascending."""


def bundle_by_prompt(rows: Sequence[Row], index: Sequence[int], *, share: bool = True) -> list[Bundle]:
    """Return `index` (places in `rows`) by equal prompts, in order of first occurrence.

    The tokens themselves decide, so replayed rows and rows of several groups are found too, and nothing is shared by
    mistake. A row alone with its prompt, or without any action token, gets a bundle of prefix 0; so does each row
    unless `share`.
    """
    if not share:
        return [Bundle(0, [i]) for i in index]
    found: dict[object, Bundle] = {}
    for place, i in enumerate(index):
        row = rows[i]
        prefix = int(row.action_mask.argmax()) if row.num_tokens else 0
        key = row.tokens[:prefix].tobytes() if prefix else place
        found.setdefault(key, Bundle(prefix, [])).members.append(i)
    return [bundle if len(bundle.members) > 1 else Bundle(0, bundle.members) for bundle in found.values()]
