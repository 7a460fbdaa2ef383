"""What on-policy and replayed rows ask of the kernels."""

from __future__ import annotations

import dataclasses

from spear_fast.losses import on_policy_terms, replay_terms
from spear_kernels import PolicyLossConfig

SETTINGS = {
    "kind": "clip_cov",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 10.0,
    "cov_ratio": 0.02,
    "cov_lower": 1.0,
    "cov_upper": 40.0,
    "kl_cov_coef": 0.7,
    "aggregation": "seq-mean-token-sum-norm",
    "norm_length": 4096,
    "entropy_coef": 0.01,
    "kl_coef": 0.1,
    "kl_kind": "k2",
}


def test_every_setting_arrives() -> None:
    terms = on_policy_terms(**SETTINGS, max_tokens=99)  # type: ignore[arg-type]
    assert {field.name for field in dataclasses.fields(PolicyLossConfig)} >= set(SETTINGS)
    assert {name: getattr(terms, name) for name in SETTINGS} == SETTINGS


def test_norm_length_defaults_to_the_longest_trajectory() -> None:
    terms = on_policy_terms(**{**SETTINGS, "norm_length": None}, max_tokens=99)  # type: ignore[arg-type]
    assert terms.norm_length == 99


def test_replay_has_its_own_bounds_and_no_regularisers() -> None:
    on_policy = on_policy_terms(**SETTINGS, max_tokens=99)  # type: ignore[arg-type]
    terms = replay_terms(on_policy, cov_ratio=0.05, cov_lower=2.0, cov_upper=60.0)
    changed = {"cov_ratio": 0.05, "cov_lower": 2.0, "cov_upper": 60.0, "entropy_coef": 0.0, "kl_coef": 0.0}
    assert {name: getattr(terms, name) for name in SETTINGS} == {**SETTINGS, **changed}
