"""What to log of a mini-batch's covariances when it is cut into micro-batches or spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spear_kernels.cov_select.library import summary_op
from spear_kernels.cov_select.op import all_rows, covariance
from spear_kernels.ranks import group_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMES = ("cov_mean", "cov_p50", "cov_p99", "cov_max")


def summarize_covariance(
    cov: torch.Tensor, mask: torch.Tensor | None, *, group: ProcessGroup | None = None
) -> dict[str, torch.Tensor]:
    """`covariance_metrics` of a known `covariance` float64 [N] of this rank's rows, with the same mask and group."""
    summary = summary_op(cov, all_rows(mask, cov), group_name(group)).float()
    return dict(zip(_NAMES, summary.unbind(), strict=True))


def covariance_metrics(
    logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor | None, *, group: ProcessGroup | None = None
) -> dict[str, torch.Tensor]:
    """cov_mean, cov_p50, cov_p99, cov_max of `covariance` over the action tokens of all ranks, float32 0-d tensors.

    The same numbers on every rank, for every order and split of the rows; 0 without action tokens. A quantile of share
    q is the value at rank floor(q * (n - 1)), counted from 0. logp, advantages [N] float; mask bool [N], None for all.

    Raises:
        ValueError: a wrong shape.
    """
    return summarize_covariance(covariance(logp, advantages, mask, group=group), mask, group=group)
