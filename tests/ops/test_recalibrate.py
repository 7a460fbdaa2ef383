"""recalibrated_advantages, scaled_advantages and median: SPEAR's replay advantages against Python numbers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_kernels.recalibrate import (
    median,
    recalibrated_advantages,
    recalibrated_advantages_reference,
    scaled_advantages,
)
from spear_kernels.testing import OperationRecorder

REWARDS = st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 0.1, 1.0]))
ROWS = st.lists(st.tuples(REWARDS, st.floats(-1, 1)), max_size=12)
BASELINE = st.lists(st.tuples(REWARDS, st.one_of(st.just(0.0), st.floats(0.01, 2))), min_size=1, max_size=9)


def columns(pairs):
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


@given(ROWS, BASELINE, st.booleans(), st.booleans())
def test_matches_the_formula(rows, baseline, std_norm, filtered):
    rewards, stored = columns(rows)
    means, stds = columns(baseline)
    arguments = (rewards, means, stds if std_norm else None, stored if filtered else None)
    advantages, keep = recalibrated_advantages(*arguments)
    expected, kept = recalibrated_advantages_reference(*arguments)
    assert advantages.dtype == torch.float64 and keep.dtype == torch.bool
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert keep.tolist() == kept


@given(st.lists(REWARDS, min_size=1, max_size=20))
def test_median_is_the_one_of_statistics(values):
    assert median(torch.tensor(values, dtype=torch.float64)).item() == statistics.median(values)


def test_a_reward_equal_to_the_median_is_not_kept():
    rewards = torch.tensor([0.1, 0.1 + 1e-16, 0.2], dtype=torch.float64)
    means = torch.full((7,), 0.1, dtype=torch.float64)
    assert recalibrated_advantages(rewards, means).keep.tolist() == [False, True, True]


def test_a_median_spread_of_zero_does_not_divide():
    result = recalibrated_advantages(torch.tensor([1.0]), torch.full((3,), 0.5), torch.tensor([0.0, 9.0, 0.0]))
    assert result.advantages.tolist() == [0.5]


def test_a_baseline_that_is_not_a_number_shows():
    """Half a sorted baseline would look sound: NaN sorts to the end."""
    assert math.isnan(median(torch.tensor([1.0, torch.nan, 2.0, 3.0])).item())
    result = recalibrated_advantages(torch.tensor([9.0]), torch.tensor([1.0, torch.nan, 2.0]))
    assert result.advantages.isnan().all() and not result.keep.any()


@given(ROWS, st.floats(0, 1))
def test_decay_scales_and_filters(rows, weight):
    _, stored = columns(rows)
    advantages, keep = scaled_advantages(stored, weight)
    assert advantages.tolist() == [value * weight for value in stored.tolist()]
    assert keep.tolist() == [value > 0 and value * weight > 0 for value in stored.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_types_give_float32(dtype):
    assert recalibrated_advantages(torch.ones(2, dtype=dtype), torch.zeros(3)).advantages.dtype == torch.float32


def test_nothing_waits_for_a_device():
    with OperationRecorder() as seen:
        recalibrated_advantages(torch.rand(4), torch.rand(5), torch.rand(5), torch.rand(4))
        scaled_advantages(torch.rand(4), 0.5)
    assert not seen.host_syncs


def test_bad_arguments_are_named():
    ones, two = torch.ones(3), torch.ones(2)
    with pytest.raises(ValueError, match="baseline_stds"):
        recalibrated_advantages(ones, ones, two)
    with pytest.raises(ValueError, match="advantages"):
        recalibrated_advantages(ones, ones, None, two)
    with pytest.raises(ValueError, match="no median"):
        recalibrated_advantages(ones, torch.zeros(0))
    with pytest.raises(ValueError, match=r"weight=-0\.5"):
        scaled_advantages(ones, -0.5)
