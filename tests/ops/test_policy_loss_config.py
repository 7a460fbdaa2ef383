"""PolicyLossConfig: bad values are refused by name."""

from __future__ import annotations

import math

import pytest

from spear_kernels import PolicyLossConfig
from spear_kernels.policy_loss.config import config_of


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "trpo"),
        ("aggregation", "mean"),
        ("kl_kind", "k4"),
        ("clip_low", -0.1),
        ("clip_high", math.nan),
        ("dual_clip", 1.0),
        ("cov_ratio", 1.5),
        ("cov_lower", 50.0),
        ("kl_coef", -1.0),
        ("kl_cov_coef", -1.0),
        ("norm_length", 0),
        ("tis_cap", 0.0),
        ("tis_cap", math.nan),
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyLossConfig(**{field: value})


@pytest.mark.parametrize("changes", [{}, {"dual_clip": 3.0, "tis_cap": 2.0}, {"norm_length": 7.0, "cov_lower": -2.0}])
def test_numbers_and_names_rebuild_the_config(changes):
    cfg = PolicyLossConfig("kl_cov", kl_kind="k1", **changes)
    assert config_of(cfg.kind, cfg.aggregation, cfg.kl_kind, tuple(cfg.numbers())) == cfg


def test_config_requires_the_norm_length():
    with pytest.raises(ValueError, match="norm_length"):
        PolicyLossConfig(aggregation="seq-mean-token-sum-norm")
