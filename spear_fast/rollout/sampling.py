"""Counter-based token sampling: a draw depends on the request's seed and the position, not on the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return one uniform number in [0, 1) per (seed, position), by the SplitMix64 finaliser.

    Args:
        seeds: uint64 [B].
        positions: uint64 [B].

    Returns:
        float64 [B].
    """
    mixed = _mix(_mix(seeds) + _GOLDEN * (positions + np.uint64(1)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sample(logits: Tensor, temperatures: Tensor, draws: Tensor, top_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick one token per row by inverting the cumulative distribution, and return its log-prob.

    Args:
        logits: [B, V], any float type; read once as float32.
        temperatures: float32 [B]; 0 takes the most likely token and reports its log-prob at temperature 1.
        draws: float64 [B], uniform in [0, 1).
        top_p: [B] in (0, 1]; a row below 1 is drawn from its nucleus. None draws all from the whole distribution.

    Returns:
        tokens int64 [B], log-probs float32 [B] in nats under the distribution that was drawn from.
    """
    greedy = temperatures == 0
    scale = torch.where(greedy, torch.ones_like(temperatures), temperatures)
    logp = torch.log_softmax(logits.float() / scale[:, None], dim=-1)  # [B, V]
    if top_p is not None:
        kept = nucleus(logp.exp(), top_p) | greedy[:, None]
        logp = torch.log_softmax(logp.masked_fill(~kept, float("-inf")), dim=-1)
    cumulative = logp.double().exp().cumsum(dim=-1)
    threshold = (draws.to(logits.device) * cumulative[:, -1])[:, None]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # A threshold that rounds up to the total would fall past the last token that has any probability.
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logp.argmax(dim=-1), drawn)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest set of the likeliest tokens whose probabilities add up to at least `top_p`.

    Args:
        probabilities: [B, V].
        top_p: [B]; a row of 1 keeps all tokens. The likeliest token always stays.

    Returns:
        bool [B, V]. Of equal probabilities at the border those with the lower id stay.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    ordered, order = probabilities.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    limit = torch.where(top_p < 1, top_p.double(), torch.inf)
    kept = before < limit[:, None]
    return torch.zeros_like(kept).scatter(1, order, kept)
