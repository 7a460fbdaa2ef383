"""Old log-probs: replaced by the trainer's, weighted, and refused when too far from the sampler's."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from spear_fast.errors import LogProbGapError
from spear_fast.update.old_logp import check_gap, correct_old_logp


@pytest.fixture
def rows(new_rows):
    rows = new_rows([6, 11, 4])
    generator = np.random.default_rng(3)
    for row in rows:
        row.old_logp = np.where(row.action_mask, generator.normal(-2, 1, row.num_tokens), 0).astype(np.float32)
    return rows


def trainer_score(rows):
    """A trainer that disagrees by up to 1.5 nats."""
    generator = np.random.default_rng(4)
    shift = [generator.uniform(-1.5, 1.5, row.num_tokens) for row in rows]
    return [
        np.where(row.action_mask, row.old_logp + s, 0).astype(np.float32) for row, s in zip(rows, shift, strict=True)
    ]


def test_recompute_replaces_and_reports(rows):
    before, expected = copy.deepcopy(rows), trainer_score(rows)
    stats = correct_old_logp(rows, trainer_score, mode="recompute")
    gaps = []
    for row, old, logp in zip(rows, before, expected, strict=True):
        np.testing.assert_array_equal(row.old_logp, logp)
        assert row.weight is None
        gaps += [abs(float(logp[t]) - float(old.old_logp[t])) for t in range(row.num_tokens) if row.action_mask[t]]
    assert stats["update/logp_gap_nats"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert stats["update/logp_gap_max_nats"] == pytest.approx(max(gaps), rel=1e-5)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_truncated_importance_weights(rows, clip):
    before, expected = copy.deepcopy(rows), trainer_score(rows)
    correct_old_logp(rows, trainer_score, mode="recompute", tis_clip=clip)
    capped = 0
    for row, old, logp in zip(rows, before, expected, strict=True):
        for t in np.flatnonzero(row.action_mask):
            ratio = math.exp(float(logp[t]) - float(old.old_logp[t]))
            capped += ratio > clip
            assert row.weight[t] == pytest.approx(min(ratio, clip), rel=1e-5)
        assert row.weight.dtype == np.float32
    assert capped > 0


def test_a_stored_array_is_not_written_into(rows):
    stored = rows[0].old_logp
    copied = stored.copy()
    correct_old_logp(rows, trainer_score, mode="recompute")
    np.testing.assert_array_equal(stored, copied)


def test_sampler_mode_leaves_rows_and_calls_nothing(rows):
    before = copy.deepcopy(rows)

    def fail(_rows):
        raise AssertionError("no forward pass is needed")

    assert correct_old_logp(rows, fail, mode="sampler") == {}
    assert all(np.array_equal(row.old_logp, old.old_logp) for row, old in zip(rows, before, strict=True))
    assert correct_old_logp([], fail, mode="recompute") == {}


@pytest.mark.parametrize("gap", [0.1001, math.inf, math.nan])
def test_gap_above_the_limit_is_fatal(gap):
    with pytest.raises(LogProbGapError, match=r"update\.max_logp_gap=0\.1.*stale"):
        check_gap(gap, 0.1)


def test_gap_within_the_limit_passes():
    check_gap(0.1, 0.1)
    check_gap(0.0, 0.1)
