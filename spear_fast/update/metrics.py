"""Metrics of an optimizer step: joined over micro-batches on the device, read back once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SUMS = ("loss", "policy_loss", "num_tokens")
"""Metrics of the loss operator whose micro-batch values add up; the others are means over action tokens."""

UNITS = {
    "entropy": "entropy_nats",
    "approx_kl_k1": "approx_kl_k1_nats",
    "approx_kl_k3": "approx_kl_nats",
    "logp_gap_mean_abs": "logp_gap_nats",
    "kl_ref": "kl_ref_nats",
    "num_tokens": "action_tokens",
    "clip_fraction": "clip_frac",
    "clip_fraction_low": "clip_low_frac",
    "clip_fraction_high": "clip_high_frac",
    "dual_clip_fraction": "dual_clip_frac",
    "selected_fraction": "selected_frac",
}
"""Name under which a metric of the loss operator is reported, where it differs."""


def join(parts: Sequence[dict[str, torch.Tensor]], prefix: str) -> dict[str, torch.Tensor]:
    """Metrics of one loss group from those of its micro-batches, 0-d tensors named `prefix/what_unit`.

    Statistics of the covariance are given for a single micro-batch only: quantiles of parts have no mean.
    """
    names = [name for name in parts[0] if len(parts) == 1 or not name.startswith("cov_")]
    table = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts])
    tokens = table[:, names.index("num_tokens")]
    means = tokens @ table / tokens.sum().clamp(min=1)
    joined = zip(names, table.sum(0), means, strict=True)
    return {f"{prefix}/{UNITS.get(name, name)}": total if name in SUMS else mean for name, total, mean in joined}


def read(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bring all metrics to the host in one transfer."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
