"""The definition of log-probabilities behind a linear head: build all logits, then the logits-level definition."""

from __future__ import annotations

import torch

from spear_kernels.logprob.reference import logprob_reference
from spear_kernels.results import LogProbs


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> LogProbs:
    """hidden [N, H], weight [V, H], bias [V], ids int64 [N]; every step in the type of the inputs, holds [N, V]."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logprob_reference(logits, ids, temperature, softcap, vocab_size)
