"""Metrics of an optimizer step: joined over micro-batches where they are, read back once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from spear_kernels import join_metrics

if TYPE_CHECKING:
    from spear_fast.dist import Ranks

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
    "ess": "ess_frac",
    "tis_clip_fraction": "tis_clip_frac",
}
"""Name under which a metric of the loss operator is reported, where it differs."""


def join(parts: Sequence[dict[str, torch.Tensor]], prefix: str) -> dict[str, torch.Tensor]:
    """Metrics of one loss group from those of its micro-batches, 0-d tensors named `prefix/what_unit`."""
    return {f"{prefix}/{UNITS.get(name, name)}": value for name, value in join_metrics(parts).items()}


def gather(parts: list[dict[str, torch.Tensor]], ranks: Ranks | None) -> list[dict[str, torch.Tensor]]:
    """Metrics of the micro-batches of all ranks, rank by rank, from those of this one.

    If there are other ranks it waits for the device, and they stay on the CPU.
    """
    if ranks is None or ranks.size == 1:
        return parts
    table = torch.stack([torch.stack(list(part.values())) for part in parts]).cpu() if parts else torch.empty(0)
    names = list(parts[0]) if parts else []
    return [
        dict(zip(names, row.unbind(), strict=True)) for names, table in ranks.gather((names, table)) for row in table
    ]


def read(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bring all metrics to the host, in one transfer from a device."""
    values: dict[str, float] = {}
    for device in {value.device for value in metrics.values()}:
        there = {name: value for name, value in metrics.items() if value.device == device}
        values |= zip(there, torch.stack(list(there.values())).tolist(), strict=True)
    return {name: values[name] for name in metrics}
