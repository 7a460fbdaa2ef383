"""Where the tokens of packed rows stand: rows end to end, or each shared prompt once before what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import Row, Segments
from .prompts import bundle_by_prompt


@dataclass(frozen=True)
class Layout:
    """Segments of a pack; `E` counts the rows' tokens end to end, `T` those that are kept.

    Example: rows P Q a b, P Q c with the prompt P Q shared have token [0, 1, 2, 3, 6], place [0, 1, 2, 3, 0, 1, 4],
    segments of lengths [2, 2, 1] with prefix [-1, 0, 0].
    """

    token: np.ndarray  # int64 [T], place of each packed token among the E
    place: np.ndarray  # int64 [E], packed place of each token
    segments: Segments


def lay_out(rows: Sequence[Row], *, share_prompts: bool) -> Layout:
    """Return the layout of rows packed in this order; rows of a shared prompt stand where the first of them does."""
    row_lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(row_lengths)])
    bundles = bundle_by_prompt(rows, range(len(rows)), share=share_prompts)
    if not any(bundle.prefix for bundle in bundles):
        every = np.arange(starts[-1])
        return Layout(every, every, Segments.of(row_lengths.tolist()))
    spans, prefix = [], []
    for bundle in bundles:
        prompt = len(spans) if bundle.prefix else -1
        if bundle.prefix:
            spans.append((starts[bundle.members[0]], bundle.prefix))
            prefix.append(-1)
        for member in bundle.members:
            spans.append((starts[member] + bundle.prefix, row_lengths[member] - bundle.prefix))
            prefix.append(prompt)
    token = np.concatenate([np.arange(first, first + length) for first, length in spans])
    place = np.full(starts[-1], -1, dtype=np.int64)
    place[token] = np.arange(len(token))
    for bundle in bundles:
        prompt = place[starts[bundle.members[0]] : starts[bundle.members[0]] + bundle.prefix]
        for member in bundle.members:
            place[starts[member] : starts[member] + bundle.prefix] = prompt
    return Layout(token, place, Segments.of([length for _, length in spans], prefix))
