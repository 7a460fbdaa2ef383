"""The Wilson interval: its defining equation, known values and edges."""

from __future__ import annotations

from math import isclose, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.statistics import wilson


@given(n=st.integers(1, 5000), share=st.floats(0, 1), z=st.floats(0.1, 5))
def test_bounds_solve_the_score_equation(n: int, share: float, z: float) -> None:
    """Each bound is the rate r at which |p - r| equals z standard errors of r itself."""
    successes = round(share * n)
    rate = successes / n
    low, high = wilson(successes, n, z)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        assert isclose(abs(rate - bound), z * sqrt(bound * (1 - bound) / n), rel_tol=1e-6, abs_tol=1e-7)


def test_textbook_value() -> None:
    low, high = wilson(10, 20)
    assert (round(low, 4), round(high, 4)) == (0.2993, 0.7007)


@given(n=st.integers(1, 10_000))
def test_sure_outcomes_touch_the_border(n: int) -> None:
    assert wilson(0, n)[0] == 0.0
    assert wilson(n, n)[1] == 1.0


def test_no_trials_say_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_named(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"successes={successes}"):
        wilson(successes, n)
