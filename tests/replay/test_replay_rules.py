"""Replay rules and recalibration against their formulas."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.replay.recalibrate import recalibrate_by_median
from spear_fast.replay.rules import admits, draw_indices, is_fresh, is_ripe
from spear_fast.types import Task, Trajectory, Turn

TASK = Task("calculator", "train", 0, seed=0)


@given(st.sampled_from([-1.0, 0.0, 1e-9, 1.0]), st.integers(0, 2), st.lists(st.booleans(), max_size=3), st.booleans())
def test_admission(advantage: float, calls: int, valid: list[bool], require_tool_call: bool) -> None:
    turns = [Turn(i + 1, i + 2, action_valid=flag) for i, flag in enumerate(valid)]
    made = Trajectory(TASK, 0, 0, 0, 0, turns=turns, num_tool_calls=5, num_valid_tool_calls=calls)
    acted = calls >= 1 if require_tool_call else True in valid
    assert admits(made, advantage, require_tool_call) == (advantage > 0 and acted)


@given(st.lists(st.integers(0, 20), max_size=10), st.integers(0, 30), st.integers(1, 10))
def test_freshness(versions: list[int], current: int, tolerate_steps: int) -> None:
    expected = [current - version <= tolerate_steps for version in versions]
    assert is_fresh(np.array(versions, dtype=np.int64), current, tolerate_steps).tolist() == expected


def test_ripe_needs_more_than_the_factor() -> None:
    assert not is_ripe(3072, 2048, 1.5)
    assert is_ripe(3073, 2048, 1.5)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 2**62))
def test_draw_takes_distinct_indices(num_eligible: int, size: int, seed: int) -> None:
    drawn = draw_indices(num_eligible, size, seed).tolist()
    assert len(set(drawn)) == len(drawn) == min(size, num_eligible)
    assert drawn == sorted(drawn) and set(drawn) <= set(range(num_eligible))
    assert drawn == draw_indices(num_eligible, size, seed).tolist()


def test_draw_is_uniform_over_subsets() -> None:
    # 6 subsets, 6000 draws: 1000 expected each, standard deviation 29; five of them bound it for a fixed seed range.
    seen = Counter(tuple(draw_indices(4, 2, seed).tolist()) for seed in range(6000))
    assert set(seen) == set(itertools.combinations(range(4), 2))
    assert all(abs(times - 1000) < 5 * 29 for times in seen.values())


@given(
    st.lists(st.floats(-2, 2), max_size=8),
    st.lists(st.floats(-2, 2), min_size=1, max_size=9),
    st.lists(st.floats(0.01, 2), min_size=1, max_size=9),
    st.booleans(),
)
def test_recalibration_by_median(rewards: list[float], means: list[float], stds: list[float], std_norm: bool) -> None:
    centre, spread = statistics.median(means), statistics.median(stds)
    expected = [(r - centre) / (spread + 1e-6) if std_norm else r - centre for r in rewards]
    got = recalibrate_by_median(np.array(rewards), centre, spread if std_norm else None)
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
