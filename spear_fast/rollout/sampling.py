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


def sample(logits: Tensor, temperatures: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one token per row by inverting the cumulative distribution, and return its log-prob.

    Args:
        logits: [B, V], any float type; read once as float32.
        temperatures: float32 [B]; 0 takes the most likely token and reports its log-prob at temperature 1.
        draws: float64 [B], uniform in [0, 1).

    Returns:
        tokens int64 [B], log-probs float32 [B] in nats at the sampling temperature.
    """
    greedy = temperatures == 0
    scale = torch.where(greedy, torch.ones_like(temperatures), temperatures)
    logp = torch.log_softmax(logits.float() / scale[:, None], dim=-1)  # [B, V]
    cumulative = logp.double().exp().cumsum(dim=-1)
    threshold = (draws.to(logits.device) * cumulative[:, -1])[:, None]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # A threshold that rounds up to the total would fall past the last token that has any probability.
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logp.argmax(dim=-1), drawn)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)
