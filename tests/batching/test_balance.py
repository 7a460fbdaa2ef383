"""Sharing rows out to ranks loses nothing, keeps the budget, and levels the work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.batching import distribute, pack
from spear_fast.types import Row

GROUPS = st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 15), min_size=1, max_size=6)), max_size=8)
"""(prompt length, response lengths) of each group."""


def make_rows(groups: list[tuple[int, list[int]]]) -> list[Row]:
    """Rows in a shuffled order; each group has a prompt of its own."""
    rows = []
    for group, (prompt, responses) in enumerate(groups):
        for response in responses:
            tokens = np.concatenate([np.full(prompt, group), 100 + np.arange(response)]).astype(np.int32)
            mask = np.arange(prompt + response) >= prompt
            rows.append(Row(len(rows), 0, 0, tokens, mask, np.zeros(len(tokens)), np.zeros(len(tokens))))
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    return [rows[i] for i in order]


def prompt_of(row: Row) -> bytes:
    return row.tokens[~row.action_mask].tobytes()


def tokens_of(rows: list[Row], batch: list[int], share: bool) -> int:
    """Tokens of a micro-batch; a shared prompt counts once."""
    if not share:
        return sum(rows[i].num_tokens for i in batch)
    prompts = {prompt_of(rows[i]): int((~rows[i].action_mask).sum()) for i in batch}
    return sum(prompts.values()) + sum(rows[i].num_action_tokens for i in batch)


@given(GROUPS, st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_every_row_once_within_the_budget_and_as_many_batches_everywhere(groups, budget, num_ranks, share):
    rows = make_rows(groups)
    shares = distribute(rows, budget, num_ranks, share_prompts=share)
    batches = [batch for rank in shares for batch in rank]
    assert len(shares) == num_ranks and len({len(rank) for rank in shares}) == 1
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert batch == sorted(batch)
        assert len(batch) == 1 or tokens_of(rows, batch, share) <= budget
    assert len(shares[0]) <= -(-len(pack(rows, budget)) // num_ranks), "sharing must not need more micro-batches"
    assert shares == distribute(rows, budget, num_ranks, share_prompts=share)


@given(GROUPS, st.integers(1, 40))
def test_one_rank_without_sharing_is_pack(groups, budget):
    rows = make_rows(groups)
    assert distribute(rows, budget, 1, share_prompts=False) == [pack(rows, budget)]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("share", [True, False])
def test_work_is_level(num_ranks, share):
    generator = np.random.default_rng(num_ranks)
    rows = make_rows([(int(generator.integers(100, 300)), generator.integers(50, 400, 8).tolist()) for _ in range(30)])
    # Narrow, so that attention is most of the work and equal tokens would not be equal work.
    shares = distribute(rows, 10_000, num_ranks, share_prompts=share, width=4)

    def work(batch: list[int]) -> float:
        def pairs(tokens: float, before: float) -> float:
            return tokens + (tokens * before + tokens**2 / 2) / 24

        total, seen = 0.0, set()
        for row in (rows[i] for i in batch):
            prompt, tail = row.num_tokens - row.num_action_tokens, row.num_action_tokens
            first = not share or prompt_of(row) not in seen
            seen.add(prompt_of(row))
            total += (pairs(prompt, 0) if first else 0.0) + pairs(tail, prompt)
        return total

    works = np.array([[work(batch) for batch in rank] for rank in shares])
    assert works.max() < 1.1 * works.mean(), "micro-batches differ"
    assert works.sum(axis=1).max() < 1.05 * works.sum(axis=1).mean(), "ranks differ"


@pytest.mark.parametrize(("num_ranks", "rows_each"), [(4, 8), (8, 4), (16, 2)])
def test_groups_are_cut_no_more_than_the_balance_needs(num_ranks, rows_each):
    rows = make_rows([(50, [10] * 8)] * 4)
    for (batch,) in distribute(rows, 1000, num_ranks, share_prompts=True):
        assert len(batch) == rows_each and len({prompt_of(rows[i]) for i in batch}) == 1


def test_sharing_fills_fewer_micro_batches():
    rows = make_rows([(90, [10] * 8)])
    assert [len(distribute(rows, 200, 1, share_prompts=share)[0]) for share in (True, False)] == [1, 4]
    assert [len(distribute(rows, 130, 1, share_prompts=share)[0]) for share in (True, False)] == [2, 8]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="num_ranks=0"):
        distribute([], 10, 0, share_prompts=True)
    with pytest.raises(ValueError, match="token_budget=0"):
        distribute([], 0, 2, share_prompts=True)
