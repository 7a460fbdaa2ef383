"""Loss operators for reinforcement learning of language models, usable from any training loop; needs torch only."""

from __future__ import annotations

from spear_kernels.backend import resolve_backend
from spear_kernels.cov_select import covariance_metrics, covariance_select
from spear_kernels.linear_logprob import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES, linear_logprob
from spear_kernels.linear_policy_loss import linear_policy_loss
from spear_kernels.logprob import logprob
from spear_kernels.policy_loss import PolicyLossConfig, join_metrics, policy_loss
from spear_kernels.results import LinearPolicyLossResult, LogProbs, PolicyLossResult
from spear_kernels.segment_reduce import segment_index, segment_rank, segment_sum

__all__ = [
    "CPU_CHUNK_BYTES",
    "DEVICE_CHUNK_BYTES",
    "LinearPolicyLossResult",
    "LogProbs",
    "PolicyLossConfig",
    "PolicyLossResult",
    "covariance_metrics",
    "covariance_select",
    "join_metrics",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "policy_loss",
    "resolve_backend",
    "segment_index",
    "segment_rank",
    "segment_sum",
]
