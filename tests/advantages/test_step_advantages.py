"""GiGPO's step groups against counting by hand."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.advantages.step_group import mean_group_size, step_groups

STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([None, "kitchen", "cellar", "attic"])), min_size=1, max_size=40
)


@given(STEPS)
def test_labels_are_equal_for_equal_anchors_of_one_group(steps: list[tuple[int, str | None]]) -> None:
    labels = step_groups(*zip(*steps, strict=True)).tolist()
    assert [label < 0 for label in labels] == [anchor is None for _, anchor in steps]
    named = [(label, step) for label, step in zip(labels, steps, strict=True) if label >= 0]
    assert all((label == other) == (step == other_step) for label, step in named for other, other_step in named)


@given(STEPS)
def test_mean_group_size_counts_steps_per_anchor(steps: list[tuple[int, str | None]]) -> None:
    keys = [step for step in steps if step[1] is not None]
    labels = step_groups(*zip(*steps, strict=True))
    if keys:
        sizes = [keys.count(key) for key in set(keys)]
        assert mean_group_size(labels) == pytest.approx(statistics.fmean(sizes))
    else:
        assert (labels == -1).all()


def test_equal_anchors_of_other_groups_are_apart() -> None:
    labels = step_groups([0, 1, 0], ["hall", "hall", "hall"])
    assert labels[0] == labels[2] != labels[1]
