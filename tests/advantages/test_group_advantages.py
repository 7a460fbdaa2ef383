"""GRPO advantages against a loop over groups."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.advantages.group import group_advantages

REWARDS = st.floats(-3, 3, allow_subnormal=False)
SAMPLES = st.lists(st.tuples(REWARDS, st.integers(0, 5)), min_size=1, max_size=40)


def slow_group_advantages(rewards: list[float], groups: list[int], std_norm: bool) -> list[float]:
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = statistics.fmean(members) if len(members) > 1 else 0.0
        std = statistics.stdev(members) if len(members) > 1 else 1.0
        advantages.append((reward - mean) / (std + 1e-6) if std_norm else reward - mean)
    return advantages


@given(SAMPLES, st.booleans())
def test_matches_the_loop(samples: list[tuple[float, int]], std_norm: bool) -> None:
    rewards, groups = [list(column) for column in zip(*samples, strict=True)]
    got = group_advantages(np.array(rewards), np.array(groups), std_norm)
    assert got.dtype == np.float64
    # Rounding of the mean (1e-15) is divided by std + 1e-6 where a group hardly varies.
    np.testing.assert_allclose(got, slow_group_advantages(rewards, groups, std_norm), rtol=1e-6, atol=1e-8)


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=16))
def test_spread_is_the_one_of_torch_std(rewards: list[float]) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-6)
    got = group_advantages(np.array(rewards), np.zeros(len(rewards), dtype=int), True)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-8)


@given(REWARDS, st.integers(2, 64), st.booleans())
def test_equal_rewards_give_exactly_zero(reward: float, size: int, std_norm: bool) -> None:
    got = group_advantages(np.full(size, reward), np.zeros(size, dtype=int), std_norm)
    assert (got == 0.0).all()


@given(SAMPLES, st.booleans(), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(samples: list[tuple[float, int]], std_norm: bool, random: object) -> None:
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(samples))  # type: ignore[attr-defined]
    rewards, groups = (np.array(column) for column in zip(*samples, strict=True))
    straight = group_advantages(rewards, groups, std_norm)
    np.testing.assert_allclose(
        group_advantages(rewards[order], groups[order], std_norm), straight[order], rtol=1e-6, atol=1e-8
    )


def test_a_group_of_one_keeps_its_reward() -> None:
    rewards, groups = np.array([0.7, 1.0, 3.0]), np.array([4, 2, 2])
    assert group_advantages(rewards, groups, False)[0] == 0.7
    assert group_advantages(rewards, groups, True)[0] == pytest.approx(0.7 / (1 + 1e-6))
