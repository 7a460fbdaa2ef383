"""The named algorithms: what each one changes in the `algo` section, and nothing else."""

from __future__ import annotations

from typing import Any

from .merge import merge

GRPO: dict[str, Any] = {
    "advantage": {"estimator": "grpo", "std_norm": True},
    "intrinsic": {"mode": "none"},
    "filters": {"overlong": False, "incomplete": False, "repetitive": False, "unreadable": False, "keep_groups": 1.0},
    "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "aggregation": "token-mean"},
    "replay": {"enabled": False},
}

DRBOT = merge(
    GRPO,
    {
        "advantage": {"std_norm": False},
        "filters": {"overlong": True, "incomplete": True, "repetitive": True, "unreadable": True, "keep_groups": 0.75},
        "loss": {"clip_high": 0.28, "dual_clip": 10.0, "aggregation": "seq-mean-token-sum-norm"},
    },
)

GIGPO = merge(GRPO, {"advantage": {"estimator": "gigpo", "step_weight": 1.0, "gamma": 0.95, "step_std_norm": True}})

SPEAR = merge(
    DRBOT,
    {
        "intrinsic": {"mode": "cosine"},
        "loss": {"kind": "clip_cov"},
        "replay": {"enabled": True, "recalibrate": "p50", "mode": "separate_step"},
    },
)

SPEAR_GIGPO = merge(
    SPEAR,
    {"advantage": {"estimator": "gigpo", "step_weight": 1.0, "gamma": 0.95, "step_std_norm": True}},
)

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "drbot": DRBOT,
    "gigpo": GIGPO,
    "spear": SPEAR,
    "spear_gigpo": SPEAR_GIGPO,
}
