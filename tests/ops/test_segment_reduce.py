"""segment_reduce: per-sequence sums, ranks and statistics for rows in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_kernels import segment_index, segment_rank, segment_sum
from spear_kernels.segment_reduce import (
    segment_rank_reference,
    segment_stats,
    segment_stats_reference,
    segment_sum_reference,
)
from spear_kernels.testing import OperationRecorder

ROWS = st.lists(st.tuples(st.sampled_from([-(2**62), -1, 0, 5, 2**62]), st.floats(-9, 9), st.booleans()), max_size=40)


def columns(rows):
    ids, values, mask = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(mask, dtype=torch.bool),
    )


@settings(max_examples=60)
@given(ROWS)
def test_sums_equal_a_dictionary(rows):
    ids, values, _ = columns(rows)
    index = segment_index(ids)
    totals: dict[int, float] = {}
    for seq_id, value in zip(ids.tolist(), values.tolist(), strict=True):
        totals[seq_id] = totals.get(seq_id, 0.0) + value
    expected = torch.tensor([totals[seq_id] for seq_id in ids.tolist()], dtype=torch.float64)
    sums = segment_sum(values, index)
    torch.testing.assert_close(sums[index], expected)
    torch.testing.assert_close(segment_sum_reference(values, ids), expected)
    assert (sums[len(totals) :] == 0).all()


@settings(max_examples=60)
@given(ROWS)
def test_ranks_equal_a_counting_loop(rows):
    ids, _, mask = columns(rows)
    seen: dict[int, int] = {}
    expected = []
    for seq_id, counted in zip(ids.tolist(), mask.tolist(), strict=True):
        expected.append(seen.get(seq_id, 0))
        seen[seq_id] = seen.get(seq_id, 0) + counted
    assert segment_rank(segment_index(ids), mask).tolist() == expected
    assert segment_rank_reference(ids, mask).tolist() == expected


@settings(max_examples=60)
@given(ROWS)
def test_statistics_equal_those_of_each_segment(rows):
    ids, values, _ = columns(rows)
    index = segment_index(ids)
    for got, expected in zip(segment_stats(values, index), segment_stats_reference(values, index), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(st.floats(-1e6, 1e6), st.integers(1, 50))
def test_equal_values_are_their_own_mean_and_have_no_spread(value, size):
    values, index = torch.full((size,), value, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    stats = segment_stats(values, index)
    assert stats.mean[0] == value and stats.std[0] == 0
    assert (stats.deviation == 0).all()


def test_statistics_of_labels_that_leave_gaps():
    stats = segment_stats(torch.tensor([4.0, 6.0, 9.0]), torch.tensor([2, 2, 0]))
    assert stats.count.tolist() == [1, 0, 2]
    assert stats.mean.tolist() == [9.0, 0.0, 5.0]
    assert stats.deviation.tolist() == [-1.0, 1.0, 0.0]
    assert stats.std.tolist() == pytest.approx([0.0, 0.0, 2**0.5])


def test_statistics_do_not_wait_for_a_device():
    with OperationRecorder() as seen:
        segment_stats(torch.rand(9), segment_index(torch.arange(9) // 2))
    assert not seen.host_syncs


def test_labels_are_dense_and_ordered():
    assert segment_index(torch.tensor([50, -3, 50, 7])).tolist() == [2, 0, 2, 1]


def test_wrong_length_is_named():
    with pytest.raises(ValueError, match="index"):
        segment_sum(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="index"):
        segment_stats(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask"):
        segment_rank(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
