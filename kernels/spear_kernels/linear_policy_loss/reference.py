"""The definition of a policy loss behind a linear head: all logits, then the loss's own definition."""

from __future__ import annotations

import torch

from spear_kernels.linear_logprob.reference import linear_logprob_reference
from spear_kernels.policy_loss.config import PolicyLossConfig
from spear_kernels.policy_loss.reference import policy_loss_reference


def linear_policy_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: PolicyLossConfig,
    seq_ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss, 0-d, in the type of hidden [N, H] and weight [V, H]; holds [N, V]."""
    logp, entropy = linear_logprob_reference(hidden, weight, ids, temperature, bias)
    return policy_loss_reference(
        logp, old_logp, advantages, mask, cfg, seq_ids, entropy, ref_logp, row_weight, selected
    )
