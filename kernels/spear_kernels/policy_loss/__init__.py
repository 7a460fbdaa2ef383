"""Policy losses from log-probabilities."""

from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.metrics import join_metrics
from spear_kernels.policy_loss.op import policy_loss
from spear_kernels.policy_loss.reference import policy_loss_reference

__all__ = ["PolicyLossConfig", "join_metrics", "policy_loss", "policy_loss_reference"]
