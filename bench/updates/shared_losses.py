"""Losses that this trainer and TRL's GRPOTrainer (1.16) both have, in the words of each.

Equal under conditions that a frozen batch meets: every sequence has an action token, and log-ratios stay inside this
trainer's clamps (20 nats a token, a mean of 10 nats a sequence), which TRL does not have. `sapo` and `vespo` are TRL's
alone; Clip-Cov, KL-Cov and plain REINFORCE are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
TRL_CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
# Mean log-ratios of sequences are far smaller than those of tokens.
SEQUENCE_CLIP = {"kind": "gspo", "clip_low": 0.03, "clip_high": 0.05}
TRL_SEQUENCE_CLIP = {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.05}
DUAL_CLIP = 3.0
LARGEST_WEIGHT = 5.0
KL_COEF = 0.05
ENTROPY_COEF = 0.01


@dataclass(frozen=True)
class SharedLoss:
    """One loss. Lengths that normalise it are added by `ours_of` and `trl_of`."""

    name: str
    ours: dict[str, Any]
    """Fields of `algo.loss`."""
    trl: dict[str, Any]
    """Fields of `GRPOConfig`."""
    why_one_batch: str | None = None
    """Why TRL's is the same only if the batch is not split for accumulation; None where it always is."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of the KL to the reference policy: `algo.loss.kl_coef`, and TRL's `beta`."""

    def ours_of(self, longest_completion: int) -> dict[str, Any]:
        """Fields of `algo.loss` for a batch with this longest completion, in tokens."""
        return {**self.ours, "kl_coef": self.kl_coef, "norm_length": longest_completion}

    def trl_of(self, longest_completion: int) -> dict[str, Any]:
        """Fields of `GRPOConfig` for such a batch; `beta` is set beside it, see `FrozenTrainer`."""
        return {**self.trl, "max_completion_length": longest_completion}


_ALL = (
    SharedLoss("dapo", {"kind": "ppo", **CLIP, "aggregation": "token-mean"}, {"loss_type": "dapo", **TRL_CLIP}),
    SharedLoss(
        "grpo", {"kind": "ppo", **CLIP, "aggregation": "seq-mean-token-mean"}, {"loss_type": "grpo", **TRL_CLIP}
    ),
    SharedLoss(
        "bnpo",
        {"kind": "ppo", **CLIP, "aggregation": "token-mean"},
        {"loss_type": "bnpo", **TRL_CLIP},
        why_one_batch="TRL averages over the tokens of each micro-batch",
    ),
    SharedLoss(
        "dr_grpo",
        {"kind": "ppo", **CLIP, "aggregation": "seq-mean-token-sum-norm"},
        {"loss_type": "dr_grpo", **TRL_CLIP},
    ),
    # Equal where delta >= 1 + epsilon_high: below, TRL's bound also cuts tokens of positive advantage.
    SharedLoss(
        "dapo-delta",
        {"kind": "ppo", **CLIP, "dual_clip": DUAL_CLIP, "aggregation": "token-mean"},
        {"loss_type": "dapo", **TRL_CLIP, "delta": DUAL_CLIP},
    ),
    SharedLoss(
        "grpo-kl",
        {"kind": "ppo", **CLIP, "aggregation": "seq-mean-token-mean"},
        {"loss_type": "grpo", **TRL_CLIP, "use_bias_correction_kl": False},
        kl_coef=KL_COEF,
    ),
    SharedLoss(
        "dapo-entropy",
        {"kind": "ppo", **CLIP, "aggregation": "token-mean", "entropy_coef": ENTROPY_COEF},
        {"loss_type": "dapo", **TRL_CLIP, "entropy_coef": ENTROPY_COEF},
        why_one_batch="TRL averages the entropy over the tokens of each micro-batch",
    ),
    SharedLoss(
        "gspo", {**SEQUENCE_CLIP, "aggregation": "seq-mean-token-mean"}, {"loss_type": "grpo", **TRL_SEQUENCE_CLIP}
    ),
    SharedLoss(
        "gspo-token-mean", {**SEQUENCE_CLIP, "aggregation": "token-mean"}, {"loss_type": "dapo", **TRL_SEQUENCE_CLIP}
    ),
    SharedLoss(
        "luspo", {**SEQUENCE_CLIP, "aggregation": "seq-mean-token-sum"}, {"loss_type": "luspo", **TRL_SEQUENCE_CLIP}
    ),
    # TRL bounds the weight above alone, and says so as a number instead of a distance from 1.
    SharedLoss(
        "cispo",
        {"kind": "cispo", "clip_low": 1.0, "clip_high": LARGEST_WEIGHT - 1, "aggregation": "token-mean"},
        {"loss_type": "cispo", "epsilon_high": LARGEST_WEIGHT},
    ),
)
LOSSES = {loss.name: loss for loss in _ALL}
