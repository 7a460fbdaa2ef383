"""group_advantages: GRPO over rewards of any order, against a loop over samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_kernels.group_advantage import group_advantages, group_advantages_reference
from spear_kernels.testing import OperationRecorder

GROUPS = st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1])
REWARDS = st.one_of(st.floats(-3, 3, allow_subnormal=False), st.sampled_from([0.0, 0.1, 1.0, 1.1]))
SAMPLES = st.lists(st.tuples(REWARDS, GROUPS), max_size=40)


def columns(samples):
    rewards, groups = zip(*samples, strict=True) if samples else ((), ())
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64)


def assert_close(actual, expected):
    # Rounding of the mean (1e-15) is divided by std + 1e-6 where a group hardly varies.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@given(SAMPLES, st.booleans())
def test_matches_the_loop(samples, std_norm):
    rewards, groups = columns(samples)
    assert_close(
        group_advantages(rewards, groups, std_norm=std_norm), group_advantages_reference(rewards, groups, std_norm)
    )


@given(st.lists(REWARDS, min_size=2, max_size=16))
def test_spread_is_the_one_of_torch_std(rewards):
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-6)
    assert_close(group_advantages(values, torch.zeros(len(values), dtype=torch.int64), std_norm=True), expected)


@given(st.floats(-1e30, 1e30), st.integers(2, 64), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_equal_rewards_give_exactly_zero(reward, size, std_norm, dtype):
    rewards = torch.full((size,), reward, dtype=dtype)
    assert (group_advantages(rewards, torch.zeros(size, dtype=torch.int64), std_norm=std_norm) == 0.0).all()


@given(SAMPLES, st.booleans(), st.integers(0, 99))
def test_order_of_samples_does_not_matter(samples, std_norm, seed):
    rewards, groups = columns(samples)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    straight = group_advantages(rewards, groups, std_norm=std_norm)
    assert_close(group_advantages(rewards[order], groups[order], std_norm=std_norm), straight[order])


def test_a_group_of_one_keeps_its_reward():
    rewards, groups = torch.tensor([0.7, 1.0, 3.0], dtype=torch.float64), torch.tensor([4, 2, 2])
    assert group_advantages(rewards, groups)[0] == 0.7
    assert group_advantages(rewards, groups, std_norm=True)[0] == pytest.approx(0.7 / (1 + 1e-6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.float64])
def test_small_types_are_computed_in_float64_and_given_in_float32(dtype):
    rewards, groups = torch.tensor([1, 0, 0, 4], dtype=dtype), torch.tensor([0, 0, 0, 9])
    advantages = group_advantages(rewards, groups)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(advantages, group_advantages_reference(rewards, groups).to(advantages.dtype))


def test_nothing_waits_for_a_device():
    with OperationRecorder() as seen:
        group_advantages(torch.rand(9), torch.arange(9) // 2, std_norm=True)
    assert not seen.host_syncs


def test_wrong_length_is_named():
    with pytest.raises(ValueError, match="group_ids"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
