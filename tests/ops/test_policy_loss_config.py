"""PolicyLossConfig: bad values are refused by name."""

from __future__ import annotations

import math

import pytest

from spear_kernels import PolicyLossConfig


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
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyLossConfig(**{field: value})


def test_config_requires_the_norm_length():
    with pytest.raises(ValueError, match="norm_length"):
        PolicyLossConfig(aggregation="seq-mean-token-sum-norm")
