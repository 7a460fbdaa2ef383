"""The definition of log-probability and entropy at a temperature, in plain differentiable torch."""

from __future__ import annotations

import torch

from spear_kernels.results import LogProbs


def logprob_reference(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> LogProbs:
    """logits [N, V] of any float type, ids int64 [N], temperature scalar or [N]; results in the type of `logits`.

    z = c tanh(logits / c) / T over the first `vocab_size` columns; logp = z[id] - logsumexp(z);
    entropy = -sum_v p_v log p_v, where p_v = 0 contributes 0.
    """
    logits = logits[:, :vocab_size]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(logits.dtype).reshape(-1, 1)
    logp_all = torch.log_softmax(logits / temperature, dim=1)
    impossible = logp_all == -torch.inf
    entropy = -(logp_all.exp() * logp_all.masked_fill(impossible, 0.0)).sum(1)
    return LogProbs(logp_all.gather(1, ids.long()[:, None])[:, 0], entropy)
