"""Loss operators for reinforcement learning of language models, usable from any training loop; needs torch only."""

from __future__ import annotations

from spear_kernels.backend import resolve_backend
from spear_kernels.cov_select import covariance_metrics, covariance_select
from spear_kernels.discounted_return import discounted_returns
from spear_kernels.group_advantage import group_advantages
from spear_kernels.linear_logprob import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES, linear_logprob
from spear_kernels.linear_policy_loss import linear_policy_loss
from spear_kernels.logprob import logprob
from spear_kernels.modules import (
    FusedLinearGRPOLoss,
    PolicyHead,
    PolicyInputs,
    PolicyOutput,
    replace_lm_head,
    restore_lm_head,
)
from spear_kernels.policy_loss import PolicyLossConfig, join_metrics, policy_loss
from spear_kernels.recalibrate import Recalibrated, median, recalibrate, recalibrated_advantages, scaled_advantages
from spear_kernels.repetition import max_ngram_counts
from spear_kernels.results import LinearPolicyLossResult, LogProbs, PolicyLossResult
from spear_kernels.segment_reduce import SegmentStats, segment_index, segment_rank, segment_stats, segment_sum
from spear_kernels.spans import span_index, spread
from spear_kernels.step_advantage import step_advantages

__all__ = [
    "CPU_CHUNK_BYTES",
    "DEVICE_CHUNK_BYTES",
    "FusedLinearGRPOLoss",
    "LinearPolicyLossResult",
    "LogProbs",
    "PolicyHead",
    "PolicyInputs",
    "PolicyLossConfig",
    "PolicyLossResult",
    "PolicyOutput",
    "Recalibrated",
    "SegmentStats",
    "covariance_metrics",
    "covariance_select",
    "discounted_returns",
    "group_advantages",
    "join_metrics",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "max_ngram_counts",
    "median",
    "policy_loss",
    "recalibrate",
    "recalibrated_advantages",
    "replace_lm_head",
    "resolve_backend",
    "restore_lm_head",
    "scaled_advantages",
    "segment_index",
    "segment_rank",
    "segment_stats",
    "segment_sum",
    "span_index",
    "spread",
    "step_advantages",
]
