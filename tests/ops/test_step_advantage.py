"""step_advantages and discounted_returns: GiGPO against loops over steps."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_kernels.discounted_return import discounted_returns, discounted_returns_reference
from spear_kernels.step_advantage import step_advantages, step_advantages_reference
from spear_kernels.testing import OperationRecorder

VALUES = st.one_of(st.floats(-3, 3, allow_subnormal=False), st.sampled_from([0.0, 0.1, 1.0]))
STEPS = st.lists(st.tuples(VALUES, st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1])), max_size=60)
GAMMAS = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0, 1))


def columns(steps):
    values, ids = zip(*steps, strict=True) if steps else ((), ())
    return torch.tensor(values, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64)


@given(STEPS, st.booleans())
def test_advantages_match_the_loop(steps, std_norm):
    returns, anchors = columns(steps)
    expected = step_advantages_reference(returns, anchors, std_norm)
    # Rounding of the mean (1e-15) is divided by std + 1e-6 where a group hardly varies.
    torch.testing.assert_close(step_advantages(returns, anchors, std_norm=std_norm), expected, rtol=1e-6, atol=1e-8)


@given(st.floats(-3, 3), st.integers(1, 40), st.booleans())
def test_equal_returns_give_exactly_zero(value, size, std_norm):
    returns, anchors = torch.full((size,), value, dtype=torch.float64), torch.full((size,), 3)
    assert (step_advantages(returns, anchors, std_norm=std_norm) == 0.0).all()


def test_steps_without_an_anchor_are_no_group():
    returns, anchors = torch.tensor([1.0, 5.0, 0.0, 2.0]), torch.tensor([-1, -1, 4, 4])
    assert step_advantages(returns, anchors).tolist() == [0.0, 0.0, -1.0, 1.0]


@given(STEPS, GAMMAS, st.booleans())
def test_returns_match_the_recurrence(steps, gamma, in_order):
    rewards, trajectories = columns(steps)
    trajectories = trajectories.sort().values if in_order else trajectories
    expected = discounted_returns_reference(rewards, trajectories, gamma)
    torch.testing.assert_close(discounted_returns(rewards, trajectories, gamma), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 1e-300, 0.5, 0.95, 0.9999, 1.0])
def test_returns_of_long_trajectories_do_not_lose_precision(gamma):
    """gamma**-t overflows from t = 1024 on at 0.5: a cumulative sum divided by it would give NaN."""
    rewards = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    trajectories = (torch.arange(5000) >= 3000).long()
    expected = discounted_returns_reference(rewards, trajectories, gamma)
    torch.testing.assert_close(discounted_returns(rewards, trajectories, gamma), expected, rtol=1e-13, atol=0)


@given(st.lists(VALUES, min_size=1, max_size=20), st.lists(VALUES, max_size=20), GAMMAS)
def test_equal_futures_give_bitwise_equal_returns(future, past, gamma):
    """Else two visits to a state with the same outcome would differ by an ulp, and one pass for an advantage."""
    rewards = torch.tensor([*past, *future, *future], dtype=torch.float64)
    trajectories = torch.tensor([0] * (len(past) + len(future)) + [1] * len(future))
    returns = discounted_returns(rewards, trajectories, gamma)
    assert torch.equal(returns[len(past) :][: len(future)], returns[-len(future) :])


def test_a_known_length_changes_nothing_and_nothing_waits(monkeypatch):
    monkeypatch.setattr(sys.modules["spear_kernels.discounted_return.op"], "host_may_wait", lambda tensor: False)
    rewards, trajectories = torch.rand(30), torch.arange(30) // 5
    expected = discounted_returns(rewards, trajectories, 0.9)
    with OperationRecorder() as seen:
        returns = discounted_returns(rewards, trajectories, 0.9, max_steps=5)
        step_advantages(returns, trajectories, std_norm=True)
    assert not seen.host_syncs
    assert torch.equal(returns, expected) and returns.dtype == torch.float32


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_its_range_is_named(gamma):
    with pytest.raises(ValueError, match=f"gamma={gamma}"):
        discounted_returns(torch.zeros(1), torch.zeros(1, dtype=torch.int64), gamma)


def test_wrong_lengths_are_named():
    with pytest.raises(ValueError, match="anchor_ids"):
        step_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="traj_ids"):
        discounted_returns(torch.zeros(3), torch.zeros(2, dtype=torch.int64), 0.9)
