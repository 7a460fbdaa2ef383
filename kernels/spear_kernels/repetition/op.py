"""`max_ngram_counts`: equal runs get equal names, first of single tokens, then of several shorter runs side by side.

A name takes log2(T) bits, so one int64 key holds three names of a million tokens: runs of 20 take about four sorts.
Names are ranks among sorted keys, not hashes: the counts are exact. Cost O(T log T log n), about 10 int64 vectors [T].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spear_kernels.checks import host_may_wait, require_shape
from spear_kernels.segment_reduce import segment_index, segment_sum

KEYS = 2**63
"""Keys are below this, to be int64 and not negative."""


class _Rows(NamedTuple):
    """Tokens with the rows of each sequence side by side, all int64 [T]."""

    tokens: torch.Tensor
    sequence: torch.Tensor
    room: torch.Tensor  # tokens from here to the end of the message, this one included; 0 outside messages


def max_ngram_counts(
    token_ids: torch.Tensor,
    seq_ids: torch.Tensor,
    n: int = 20,
    *,
    num_seqs: int,
    message_ids: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    enough: int = 1,
) -> torch.Tensor:
    """How often the most frequent run of `n` token ids occurs in each sequence, int64 [num_seqs]; 0 below `enough`.

    Runs are consecutive rows of one sequence and overlap. `token_ids` int [T], any values; `seq_ids` int [T] in 0 to
    num_seqs - 1, sequences may interleave. Runs stay within stretches of equal `message_ids` int [T] and hold no token
    with a negative message id (as `span_index` marks rows between messages) or with `mask` bool [T] False; equal runs
    of different messages are counted together. A larger `enough` drops rare runs earlier: faster on the CPU.

    On the CPU runs that are too rare leave the sorts. On a device every sort has T keys, because removing rows would
    make the host wait; nothing else does. There seq_ids are not checked.

    Raises:
        ValueError: lengths differ, `n`, `enough` or `num_seqs` is out of range, or (on the CPU) a seq_id is.
    """
    rows = _rows(token_ids, seq_ids, message_ids, mask)
    _check_numbers(rows, n, num_seqs, enough)
    counts = torch.zeros(num_seqs, dtype=torch.int64, device=token_ids.device)
    if len(token_ids) < n:
        return counts
    if enough == 1:
        # A run that occurs once needs no name: all there is to know is whether there is one.
        counts.scatter_reduce_(0, rows.sequence, (rows.room >= n).long(), "amax")
    heads, times = _frequent_runs(rows, n, num_seqs, max(enough, 2))
    return counts.scatter_reduce_(0, rows.sequence.index_select(0, heads), times, "amax")


def _check_numbers(rows: _Rows, n: int, num_seqs: int, enough: int) -> None:
    for name, value in (("n", n), ("enough", enough)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if len(rows.tokens) >= 2**31:
        raise ValueError(f"token_ids has {len(rows.tokens)} rows, more than 2**31 - 1; pass fewer sequences at a time")
    if len(rows.tokens) and host_may_wait(rows.tokens):
        low, high = int(rows.sequence[0]), int(rows.sequence[-1])
        if low < 0 or high >= num_seqs:
            raise ValueError(f"seq_ids reach from {low} to {high}, outside 0 to num_seqs - 1 = {num_seqs - 1}")


def _rows(
    tokens: torch.Tensor, sequence: torch.Tensor, message: torch.Tensor | None, mask: torch.Tensor | None
) -> _Rows:
    for name, tensor in {"seq_ids": sequence, "message_ids": message, "mask": mask}.items():
        require_shape(name, tensor, tuple(tokens.shape))
    message = torch.zeros_like(tokens, dtype=torch.int64) if message is None else message.long()
    message = message if mask is None else torch.where(mask, message, -1)
    tokens, sequence = tokens.long(), sequence.long()
    if not (host_may_wait(sequence) and bool((sequence[1:] >= sequence[:-1]).all())):
        sequence, order = sequence.sort(stable=True)
        tokens, message = tokens.index_select(0, order), message.index_select(0, order)
    return _Rows(tokens, sequence, _room(sequence, message))


def _room(sequence: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    """Rows from each row to the end of its stretch of equal sequence and message, int64 [T]; 0 if message < 0."""
    opens = torch.ones_like(sequence, dtype=torch.bool)
    opens[1:] = (sequence[1:] != sequence[:-1]) | (message[1:] != message[:-1])
    stretch = opens.long().cumsum(0) - 1
    ends = segment_sum(torch.ones_like(stretch), stretch).cumsum(0)
    rows = torch.arange(len(stretch), device=stretch.device)
    return torch.where(message < 0, 0, ends.index_select(0, stretch) - rows)


def _frequent_runs(rows: _Rows, n: int, num_seqs: int, enough: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First rows of runs of n and how often each occurs in its sequence, int64 [K] each; 0 times if below `enough`."""
    names, num_names = _token_names(rows.tokens, num_seqs)
    heads, prefix, num_prefixes = torch.arange(len(names), device=names.device), rows.sequence, num_seqs
    length = 1
    while True:
        offsets, length = _pieces(num_names, num_prefixes, length, n)
        keys = _keys(names, heads, prefix, num_names, offsets)
        keys = torch.where(rows.room.index_select(0, heads) >= length, keys, -1)
        if host_may_wait(keys):
            named = (keys >= 0).nonzero().squeeze(1)
            heads, keys = heads.index_select(0, named), keys.index_select(0, named)
        found, times = _frequent_names(keys, enough)
        if length == n or len(heads) == 0:
            return heads, times
        names = torch.full_like(names, -1).scatter_(0, heads, found)
        num_names = int(found.max()) + 1 if host_may_wait(found) else len(found)
        # Names of the first round already tell sequences apart.
        prefix, num_prefixes = torch.zeros_like(heads), 1


def _token_names(tokens: torch.Tensor, num_seqs: int) -> tuple[torch.Tensor, int]:
    """Names from 0 up for token ids, int64 [T], and a number above all of them that leaves a key room for num_seqs."""
    if host_may_wait(tokens):
        low, high = (int(bound) for bound in tokens.aminmax())
        if num_seqs * (high - low + 1) <= KEYS:
            return tokens - low, high - low + 1
    return segment_index(tokens), len(tokens)


def _pieces(num_names: int, num_prefixes: int, length: int, n: int) -> tuple[list[int], int]:
    """Offsets of the runs of `length` that one key can name side by side, and the length they cover together."""
    most, keys = -(-n // length), num_prefixes * num_names
    num_pieces = 1
    while num_pieces < most and keys * num_names <= KEYS:
        num_pieces, keys = num_pieces + 1, keys * num_names
    covered = min(n, num_pieces * length)
    # The last one overlaps its neighbour rather than reach beyond.
    return [min(piece * length, covered - length) for piece in range(num_pieces)], covered


def _keys(
    names: torch.Tensor, heads: torch.Tensor, prefix: torch.Tensor, num_names: int, offsets: list[int]
) -> torch.Tensor:
    """Prefix and names at the offsets from each head as digits of one number, int64 [K]; -1 where one has no name."""
    keys, alive = prefix, torch.ones_like(prefix, dtype=torch.bool)
    for offset in offsets:
        piece = names.index_select(0, (heads + offset).clamp(max=len(names) - 1))
        keys, alive = keys * num_names + piece, alive & (piece >= 0)
    return torch.where(alive, keys, -1)


def _frequent_names(keys: torch.Tensor, enough: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A name per key, -1 for negative keys and those seen fewer than `enough` times, and how often; int64 [K] each.

    A run is at most as frequent as its parts, so rare ones need not be extended: little is left after a few rounds.
    """
    label = segment_index(keys)
    times = segment_sum(torch.ones_like(label), label).index_select(0, label)
    frequent = (keys >= 0) & (times >= enough)
    return torch.where(frequent, label, -1), torch.where(frequent, times, 0)
