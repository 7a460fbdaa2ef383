"""The definition of n-gram counts: a counter of tuples for every sequence."""

from __future__ import annotations

from collections import Counter

import torch


def max_ngram_counts_reference(
    token_ids: torch.Tensor,
    seq_ids: torch.Tensor,
    n: int = 20,
    *,
    num_seqs: int,
    message_ids: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """For each sequence how often its most frequent run of n tokens of one message occurs, int64 [num_seqs]."""
    messages = [0] * len(token_ids) if message_ids is None else message_ids.tolist()
    counted = [True] * len(token_ids) if mask is None else mask.tolist()
    most = []
    for sequence in range(num_seqs):
        rows = [row for row, seq in enumerate(seq_ids.tolist()) if seq == sequence]
        runs: Counter[tuple[int, ...]] = Counter()
        for start in range(len(rows) - n + 1):
            run = rows[start : start + n]
            if all(counted[row] and messages[row] == messages[run[0]] >= 0 for row in run):
                runs[tuple(token_ids[run].tolist())] += 1
        most.append(max(runs.values(), default=0))
    return torch.tensor(most, dtype=torch.int64)
