"""What the covariance selection stands on: order-free means, and the k-th smallest key by histograms."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_kernels.cov_select.radix import key_value, kth_smallest, ordered_key
from spear_kernels.cov_select.statistics import column_statistics

INT64 = st.integers(-(2**63), 2**63 - 1)
FINITE = st.floats(-1e150, 1e150)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=150)
@given(
    st.lists(st.one_of(INT64, st.integers(-3, 3)), min_size=1, max_size=40),
    st.integers(1, 45),
    st.integers(0, 2**31),
)
def test_kth_smallest_equals_sorting(keys, k, seed):
    alive = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)) < 0.7
    found = kth_smallest(torch.tensor(keys), alive, torch.tensor(k), None)
    ranked = sorted(key for key, is_alive in zip(keys, alive.tolist(), strict=True) if is_alive)
    expected = ranked[k - 1] if k <= len(ranked) else 2**63 - 1
    assert found.key == expected
    assert torch.equal(found.ties, alive & (torch.tensor(keys) == expected))
    assert found.remaining == k - sum(key < expected for key in ranked)


@settings(max_examples=150)
@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_keys_order_as_floats_do(a, b):
    low, high = ordered_key(double([a, b])).tolist()
    assert torch.equal(key_value(torch.tensor([low, high])), double([a, b]))
    assert a == b or (low < high) == (a < b)


@settings(max_examples=200)
@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(0, 2**31))
def test_mean_has_the_same_bits_in_every_order_and_is_near_the_exact_one(values, seed):
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    column, mask = double(values), torch.ones(len(values), dtype=torch.bool)
    mean = column_statistics((column,), mask, None).mean
    assert torch.equal(column_statistics((column[order],), mask, None).mean, mean)
    exact = sum(map(Fraction, values)) / len(values)
    allowed = Fraction(max(map(abs, values))) * Fraction(1, 2**50) + Fraction(1, 2**900)
    assert abs(Fraction(mean.item()) - exact) <= allowed


def test_plain_sum_would_depend_on_the_order_where_the_mean_does_not():
    """A million log-probs with outliers: their float64 sum changes with the order, the statistics do not."""
    random = torch.Generator().manual_seed(0)
    logp = -torch.rand(1_000_000, generator=random, dtype=torch.float64) * 3
    logp[::100_000] = -9.9e3 / 7
    mask = torch.rand(1_000_000, generator=random) < 0.9
    assert logp.cumsum(0)[-1] != logp.flip(0).cumsum(0)[-1]
    mean = column_statistics((logp,), mask, None).mean
    order = torch.randperm(1_000_000, generator=random)
    assert torch.equal(column_statistics((logp[order],), mask[order], None).mean, mean)


@pytest.mark.parametrize("value", [0.1, -1e-300, 5e-324, 1.7e308, 0.0])
def test_constant_column_is_its_own_mean(value):
    statistics = column_statistics((torch.full((77,), value, dtype=torch.float64),), torch.ones(77).bool(), None)
    assert statistics.mean.item() == value
    assert statistics.maximum.item() == value
    assert statistics.count == 77


def test_columns_without_rows_or_without_finite_values_are_nan():
    column = double([1.0, torch.inf, 3.0])
    for mask in (torch.zeros(3).bool(), torch.ones(3).bool()):
        statistics = column_statistics((column,), mask, None)
        assert statistics.count == mask.sum()
        assert statistics.mean.isnan().all()
        assert statistics.maximum.isnan().all()
    assert column_statistics((column,), torch.tensor([True, False, True]), None).mean.item() == 2.0
