"""What the operators return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class LogProbs(NamedTuple):
    """Log-probability of the given tokens and entropy of their distributions, in nats, float32 or float64."""

    logp: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]


@dataclass(frozen=True)
class PolicyLossResult:
    """Loss to call backward on, and detached 0-d metrics."""

    loss: torch.Tensor  # 0-d, differentiable
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True)
class LinearPolicyLossResult(PolicyLossResult):
    """A policy loss computed from hidden states, with the detached log-probs; masked-out rows hold 0."""

    logp: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]
