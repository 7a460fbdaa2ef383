"""Policy losses from hidden states and the head, loss and gradients in one sweep."""

from spear_kernels.linear_policy_loss.op import linear_policy_loss
from spear_kernels.linear_policy_loss.reference import linear_policy_loss_reference

__all__ = ["linear_policy_loss", "linear_policy_loss_reference"]
