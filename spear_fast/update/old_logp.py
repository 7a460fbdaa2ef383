"""The log-probs that ratios are taken against: the sampler's or the trainer's, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from spear_fast.errors import LogProbGapError
from spear_fast.types import Row


def correct_old_logp(
    rows: Sequence[Row],
    score: Callable[[Sequence[Row]], list[np.ndarray]],
    *,
    mode: Literal["sampler", "recompute"],
    tis_clip: float | None = None,
    version: int | None = None,
) -> dict[str, float]:
    """Prepare `old_logp` and `weight` of fresh rows before the first update; return the gap to the sampler in nats.

    "sampler" leaves the rows alone and returns nothing: the first optimizer step measures the gap for free, as its
    metric `logp_gap_nats`. "recompute" puts the trainer's log-probs in their place and, with `tis_clip`, sets
    weight = min(exp(trainer - sampler), tis_clip), truncated importance sampling, which corrects for the tokens having
    been drawn by the sampler. With `version`, the policy's, the gap is that of rows sampled by it alone; without such
    rows nothing is returned.
    """
    if mode == "sampler" or not rows:
        return {}
    gaps = []
    for row, logp in zip(rows, score(rows), strict=True):
        gap = np.where(row.action_mask, logp - row.old_logp, 0.0).astype(np.float32)
        if version is None or row.version >= version:
            gaps.append(gap[row.action_mask])
        row.old_logp = logp
        if tis_clip is not None:
            row.weight = np.exp(np.minimum(gap, np.log(tis_clip))).astype(np.float32)
    if not gaps:
        return {}
    gap = np.abs(np.concatenate(gaps), dtype=np.float64)
    return {
        "update/logp_gap_nats": float(gap.mean()) if gap.size else 0.0,
        "update/logp_gap_max_nats": float(gap.max(initial=0.0)),
    }


def check_gap(gap: float, limit: float) -> None:
    """Raise LogProbGapError if the mean |trainer - sampler| gap of fresh rows, in nats, exceeds `limit` or is NaN."""
    if not gap <= limit:
        raise LogProbGapError(
            f"mean |trainer - sampler| log-prob gap is {gap:.4g} nats, above update.max_logp_gap={limit:g}: the "
            "sampler holds other weights than the trainer (stale sync), or another temperature, type or attention. "
            "Check the weights version that the engine reports; raise update.max_logp_gap only for known rounding"
        )
