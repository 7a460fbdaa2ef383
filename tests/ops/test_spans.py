"""span_index and spread: rows of sequences and turns, and values put on them."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_kernels.spans import span_index, span_index_reference, spread, spread_reference
from spear_kernels.testing import OperationRecorder

GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=8)


def spans_of(gaps_and_lengths, tail):
    """Starts and ends of spans that lie behind gaps, and the number of rows."""
    ends = torch.tensor(gaps_and_lengths, dtype=torch.int64).reshape(-1, 2).sum(1).cumsum(0)
    lengths = torch.tensor([length for _, length in gaps_and_lengths], dtype=torch.int64)
    return ends - lengths, ends, int(ends[-1] if len(ends) else 0) + tail


@given(GAPS_AND_LENGTHS, st.integers(0, 3))
def test_index_names_the_span_of_each_row(gaps_and_lengths, tail):
    starts, ends, num_rows = spans_of(gaps_and_lengths, tail)
    index = span_index(starts, ends, num_rows)
    assert index.dtype == torch.int64
    assert torch.equal(index, span_index_reference(starts, ends, num_rows))


@given(GAPS_AND_LENGTHS, st.integers(0, 3), st.integers(0, 99))
def test_values_lie_on_the_rows_of_their_span(gaps_and_lengths, tail, seed):
    starts, ends, num_rows = spans_of(gaps_and_lengths, tail)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(starts), generator=generator, dtype=torch.float64)
    mask = torch.rand(num_rows, generator=generator) > 0.3
    index = span_index(starts, ends, num_rows)
    assert torch.equal(spread(values, index, mask), spread_reference(values, index, mask))
    assert torch.equal(spread(values, index), spread_reference(values, index, torch.ones_like(mask)))


def test_cumulative_lengths_are_spans():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert span_index(cu_seqlens[:-1], cu_seqlens[1:], 5).tolist() == [0, 0, 2, 2, 2]


def test_masked_rows_hide_values_that_are_not_numbers():
    index, mask = torch.tensor([0, 0, 1]), torch.tensor([True, True, False])
    assert spread(torch.tensor([1.0, torch.nan]), index, mask).tolist() == [1.0, 1.0, 0.0]


def test_nothing_waits_for_a_device(monkeypatch):
    monkeypatch.setattr(sys.modules["spear_kernels.spans.op"], "host_may_wait", lambda tensor: False)
    with OperationRecorder() as seen:
        index = span_index(torch.tensor([1]), torch.tensor([3]), 4)
        values = spread(torch.tensor([5.0]), index, torch.tensor([True, True, False, True]))
    assert not seen.host_syncs
    assert values.tolist() == [0.0, 5.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("starts", "ends", "named"),
    [
        ([0, 1], [2, 3], r"starts\[0\]=0, ends\[0\]=2 must lie within 0 and 1"),
        ([2, 0], [3, 1], r"ends\[0\]=3"),
        ([-1], [1], r"starts\[0\]=-1"),
        ([2], [1], r"ends\[0\]=1"),
        ([0], [5], r"ends\[0\]=5"),
        ([0], [1, 2], "ends has shape"),
    ],
)
def test_spans_that_are_no_spans_are_named(starts, ends, named):
    with pytest.raises(ValueError, match=named):
        span_index(torch.tensor(starts), torch.tensor(ends), 4)


def test_a_mask_of_another_length_is_named():
    with pytest.raises(ValueError, match="mask"):
        spread(torch.zeros(1), torch.zeros(3, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
