"""The schedules against their formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.schedules import cosine_decay, cosine_warmup, intrinsic_weight, linear_warmup, warmup_cosine

STEPS = st.integers(0, 1000)
LENGTHS = st.integers(1, 500)


@given(STEPS, LENGTHS)
def test_cosine_decay_is_the_formula(step: int, decay_steps: int) -> None:
    expected = (math.cos(math.pi * step / decay_steps) + 1) / 2 if step <= decay_steps else 0.0
    assert cosine_decay(step, decay_steps) == pytest.approx(expected, abs=1e-12)


@given(STEPS, LENGTHS)
def test_cosine_warmup_is_the_formula(step: int, warmup_steps: int) -> None:
    expected = (1 - math.cos(math.pi * step / warmup_steps)) / 2 if step <= warmup_steps else 1.0
    assert cosine_warmup(step, warmup_steps) == pytest.approx(expected, abs=1e-12)


def test_ends_and_middle() -> None:
    assert [cosine_decay(step, 200) for step in (0, 100, 200, 201)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert [cosine_warmup(step, 300) for step in (0, 150, 300, 301)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_length_zero_means_finished() -> None:
    assert cosine_decay(0, 0) == 0.0
    assert cosine_warmup(0, 0) == 1.0
    assert linear_warmup(0, 0) == 1.0


@given(STEPS, LENGTHS)
def test_intrinsic_weight_picks_the_mode(step: int, decay_steps: int) -> None:
    assert intrinsic_weight("cosine", step, decay_steps) == cosine_decay(step, decay_steps)
    assert intrinsic_weight("constant", step, decay_steps) == 1.0
    assert intrinsic_weight("none", step, decay_steps) == 0.0


def test_intrinsic_weight_refuses_other_modes() -> None:
    with pytest.raises(ValueError, match="mode='linear'"):
        intrinsic_weight("linear", 0, 10)  # type: ignore[arg-type]


@given(STEPS, LENGTHS)
def test_linear_warmup_never_stands_still(step: int, warmup_steps: int) -> None:
    assert linear_warmup(step, warmup_steps) == pytest.approx(min(1.0, (step + 1) / warmup_steps))
    assert linear_warmup(warmup_steps - 1, warmup_steps) == 1.0
    assert linear_warmup(step, warmup_steps) > 0.0


@given(st.integers(0, 50), st.integers(1, 200))
def test_warmup_cosine_rises_then_falls_to_zero(warmup_steps: int, cosine_steps: int) -> None:
    total_steps = warmup_steps + cosine_steps
    factors = [warmup_cosine(step, warmup_steps, total_steps) for step in range(total_steps + 1)]
    assert factors[:warmup_steps] == [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert factors[warmup_steps] == 1.0
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert min(factors[:-1]) > 0.0
