"""Rows to the micro-batches of all ranks: as many for each, equal work, within the token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..types import Row
from .pack import pack
from .prompts import bundle_by_prompt

LIMIT_HALVINGS = 8
"""Bisections of the largest work of a micro-batch; each halves what is left between the bounds."""


def distribute(
    rows: Sequence[Row], token_budget: int, num_ranks: int, *, share_prompts: bool, width: int = 2048
) -> list[list[list[int]]]:
    """Return [rank][micro-batch] -> row indices, ascending; every row occurs once.

    All ranks get the same number of micro-batches, as few as possible, and micro-batches that run at the same time
    have about equal work (see `_works`), since sharded ranks wait for each other in every layer. A micro-batch is
    empty where there are fewer rows than places. Its tokens sum to at most `token_budget`, a shared prompt counted
    once; a longer row sits alone. The result depends on the arguments alone, so any rank can work out all shares.
    For one rank without shared prompts it is `pack(rows, token_budget)`.

    Work is levelled by MULTIFIT (Coffman, Garey, Johnson 1978): first-fit-decreasing under a limit on the work, and
    the smallest limit that holds everything is searched by bisection. A group is split over micro-batches, each with
    a prompt of its own, only where it does not fit as a whole.

    Args:
        rows: The sequences.
        token_budget: Tokens of a micro-batch.
        num_ranks: Ranks that work at the same time.
        share_prompts: Whether a micro-batch computes a prompt once for all its rows that begin with it.
        width: Hidden width of the model, for the weight of attention in the work.

    Raises:
        ValueError: For a budget or a number of ranks below 1.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} must be at least 1")
    packed = pack(rows, token_budget)
    if not rows or (num_ranks == 1 and not share_prompts):
        return [packed if rank == 0 else [[] for _ in packed] for rank in range(num_ranks)]
    items = _items(rows, token_budget, width, share_prompts)
    most = -(-len(packed) // num_ranks)
    shelf = _fewest(items, token_budget, num_ranks, most, exact=not share_prompts)
    if num_ranks > 1:
        shelf = _levelled(items, shelf)
    return _deal(shelf, num_ranks)


@dataclass(frozen=True)
class _Item:
    """Rows that share a prompt, or one row: what is put into a micro-batch as a whole if possible."""

    members: list[int]
    tokens: np.ndarray  # int64 [n], tokens of each row behind the prompt, falling
    works: np.ndarray  # float64 [n]
    prefix_tokens: int
    prefix_work: float
    alone: bool
    """Longer than the budget."""

    @property
    def total_tokens(self) -> int:
        return self.prefix_tokens + int(self.tokens.sum())

    @property
    def total_work(self) -> float:
        return self.prefix_work + float(self.works.sum())

    def take(self, places: list[int]) -> _Item:
        members = [self.members[place] for place in places]
        return _Item(members, self.tokens[places], self.works[places], self.prefix_tokens, self.prefix_work, self.alone)


@dataclass
class _Shelf:
    """Micro-batches being filled."""

    token_budget: int
    work_limit: float
    tokens: np.ndarray  # int64 [B]
    work: np.ndarray  # float64 [B]
    members: list[list[int]] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int, token_budget: int, work_limit: float) -> _Shelf:
        members: list[list[int]] = [[] for _ in range(size)]
        return cls(token_budget, work_limit, np.zeros(size, dtype=np.int64), np.zeros(size), members)

    def fill(self, items: Sequence[_Item]) -> bool:
        """Put all items in; False if they do not fit."""
        return all(self._place(item) for item in items)

    def _place(self, item: _Item) -> bool:
        while True:
            room = (self.tokens + item.total_tokens <= self.token_budget) & (
                self.work + item.total_work <= self.work_limit
            )
            fitting = np.flatnonzero(self.tokens == 0 if item.alone else room)
            if len(fitting):
                self._put(item, int(fitting[0]))
                return True
            if len(item.members) == 1:
                return False
            emptiest = int(np.argmax(self._free()))
            taken = self._fitting_rows(item, emptiest)
            if not taken:
                return False
            self._put(item.take(taken), emptiest)
            item = item.take(sorted(set(range(len(item.members))) - set(taken)))

    def _free(self) -> np.ndarray:
        """Free share of each micro-batch: of its tokens or of its work, whichever is less."""
        return np.minimum(1 - self.tokens / self.token_budget, 1 - self.work / self.work_limit)

    def _fitting_rows(self, item: _Item, place: int) -> list[int]:
        tokens = self.token_budget - int(self.tokens[place]) - item.prefix_tokens
        work = self.work_limit - float(self.work[place]) - item.prefix_work
        taken = []
        for row in range(len(item.members)):
            if item.tokens[row] <= tokens and item.works[row] <= work:
                taken.append(row)
                tokens -= int(item.tokens[row])
                work -= float(item.works[row])
        return taken

    def _put(self, item: _Item, place: int) -> None:
        self.tokens[place] += item.total_tokens
        self.work[place] += item.total_work
        self.members[place] += item.members


def _works(tokens: np.ndarray, before: int, width: int) -> np.ndarray:
    """Work of sequences of `tokens` tokens with `before` tokens ahead of each, in tokens through the linear layers.

    A layer of width H spends about 24 H^2 operations per token in its matrices and 4 H per query-key pair (scores and
    values), so a pair weighs 1 / (6 H) tokens. A token sees those before it and itself, on average half its own.
    """
    return tokens + tokens * (before + tokens / 2) / (6 * width)


def _items(rows: Sequence[Row], token_budget: int, width: int, share_prompts: bool) -> list[_Item]:
    """Return what is to be placed: rows over the budget first, then by falling work."""
    lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    too_long = [int(i) for i in np.flatnonzero(lengths > token_budget)]
    rest = [int(i) for i in np.flatnonzero(lengths <= token_budget)]
    items = []
    for alone, indices in ((True, too_long), (False, rest)):
        for prefix, members in bundle_by_prompt(rows, indices, share=share_prompts and not alone):
            falling = sorted(members, key=lambda i: (-lengths[i], i))
            tails = lengths[falling] - prefix
            prefix_work = float(_works(np.array(prefix), 0, width))
            items.append(_Item(falling, tails, _works(tails, prefix, width), prefix, prefix_work, alone))
    return sorted(items, key=lambda item: (not item.alone, -item.total_work))


def _fewest(items: list[_Item], token_budget: int, num_ranks: int, most: int, exact: bool) -> _Shelf:
    """Fill the fewest micro-batches, a multiple of `num_ranks`; `most` per rank hold unshared rows.

    `exact` says that fewer than `most` cannot do.
    """
    everything = sum(item.total_work for item in items) * (1 + len(items))

    def filled(per_rank: int) -> _Shelf | None:
        shelf = _Shelf.empty(per_rank * num_ranks, token_budget, everything)
        return shelf if shelf.fill(items) else None

    best = filled(most)
    if best is None:
        most = -(-sum(len(item.members) for item in items) // num_ranks)
        best = filled(most)
        assert best is not None, "one micro-batch per row holds everything"
    num_alone = sum(item.alone for item in items)
    tokens = sum(item.total_tokens for item in items if not item.alone)
    low = most if exact else max(1, -(-(num_alone + -(-tokens // token_budget)) // num_ranks))
    high = most
    while low < high:
        middle = (low + high) // 2
        shelf = filled(middle)
        if shelf is None:
            low = middle + 1
        else:
            best, high = shelf, middle
    return best


def _levelled(items: list[_Item], shelf: _Shelf) -> _Shelf:
    """Fill as many micro-batches with the smallest limit on their work that bisection finds."""
    size, high = len(shelf.members), float(shelf.work.max())
    heaviest_row = max(item.prefix_work + float(item.works.max()) for item in items)
    low = max(heaviest_row, sum(item.total_work for item in items) / size)
    for _ in range(LIMIT_HALVINGS):
        middle = (low + high) / 2
        trial = _Shelf.empty(size, shelf.token_budget, middle)
        if trial.fill(items):
            shelf, high = trial, min(middle, float(trial.work.max()))
        else:
            low = middle
    return shelf


def _deal(shelf: _Shelf, num_ranks: int) -> list[list[list[int]]]:
    """Hand micro-batches out by falling work, back and forth over the ranks."""
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    order = np.argsort(-shelf.work, kind="stable")
    for turn, start in enumerate(range(0, len(order), num_ranks)):
        places = order[start : start + num_ranks]
        for rank, place in enumerate(places if turn % 2 == 0 else places[::-1]):
            ranks[rank].append(sorted(shelf.members[place]))
    return ranks
