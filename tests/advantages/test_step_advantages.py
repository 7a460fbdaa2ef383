"""GiGPO step advantages against loops over trajectories and anchor groups."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.advantages.step_group import discounted_returns, mean_group_size, step_advantages, step_groups

RETURNS = st.floats(-3, 3, allow_subnormal=False)
STEPS = st.lists(
    st.tuples(RETURNS, st.integers(0, 2), st.sampled_from([None, "kitchen", "cellar", "attic"])),
    min_size=1,
    max_size=40,
)


def slow_step_advantages(steps: list[tuple[float, int, str | None]], std_norm: bool) -> list[float]:
    advantages = []
    for value, group, anchor in steps:
        same = [v for v, g, a in steps if (g, a) == (group, anchor)]
        if anchor is None or len(same) == 1:
            advantages.append(0.0)
            continue
        centred = value - statistics.fmean(same)
        advantages.append(centred / (statistics.stdev(same) + 1e-6) if std_norm else centred)
    return advantages


@given(st.lists(RETURNS, max_size=20), st.floats(0, 1))
def test_returns_are_discounted_sums(rewards: list[float], gamma: float) -> None:
    expected = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    np.testing.assert_allclose(discounted_returns(np.array(rewards), gamma), expected, rtol=1e-9, atol=1e-9)


@given(STEPS, st.booleans())
def test_matches_the_loop(steps: list[tuple[float, int, str | None]], std_norm: bool) -> None:
    returns, groups, anchors = [list(column) for column in zip(*steps, strict=True)]
    got = step_advantages(np.array(returns), step_groups(groups, anchors), std_norm)
    np.testing.assert_allclose(got, slow_step_advantages(steps, std_norm), rtol=1e-6, atol=1e-8)


@given(STEPS)
def test_mean_group_size_counts_steps_per_anchor(steps: list[tuple[float, int, str | None]]) -> None:
    keys = [(group, anchor) for _, group, anchor in steps if anchor is not None]
    labels = step_groups([group for _, group, _ in steps], [anchor for _, _, anchor in steps])
    if keys:
        sizes = [keys.count(key) for key in set(keys)]
        assert mean_group_size(labels) == pytest.approx(statistics.fmean(sizes))
    else:
        assert (labels == -1).all()


def test_equal_anchors_of_other_groups_are_apart() -> None:
    labels = step_groups([0, 1, 0], ["hall", "hall", "hall"])
    assert labels[0] == labels[2] != labels[1]
