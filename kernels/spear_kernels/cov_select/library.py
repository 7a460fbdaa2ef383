"""The operators of this folder as torch.library operators: torch.compile calls them without looking inside.

A process group is passed by its name, as torch's functional collectives do. Inputs must be detached. `seed` and the
sizes are symbolic, so new values of them do not recompile.
"""

from __future__ import annotations

import torch

from spear_kernels.cov_select.choice import choose_rows
from spear_kernels.cov_select.radix import key_value, kth_smallest, ordered_key
from spear_kernels.cov_select.statistics import column_statistics


def covariance_rows(
    logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, group: str | None
) -> torch.Tensor:
    """(A - mean A) * (logp - mean logp) with means over all ranks, float64 [N]; 0 where bool `mask` [N] is False."""
    mean = column_statistics((advantages, logp), mask, group).mean
    product = (advantages.double() - mean[0]) * (logp.double() - mean[1])
    return torch.where(mask, product, 0)


def covariance_summary(cov: torch.Tensor, mask: torch.Tensor, group: str | None) -> torch.Tensor:
    """Mean, median, 99th percentile and maximum of cov float64 [N] over all ranks' rows with `mask` True, float64 [4].

    `mask` is bool [N]. The quantile of share q is the value at rank floor(q * (n - 1)), counted from 0. Zeros if n = 0.
    """
    statistics = column_statistics((cov,), mask, group)
    last = (statistics.count - 1).clamp(min=0)
    keys = ordered_key(cov)
    quantiles = [
        key_value(kth_smallest(keys, mask, (last.double() * share).long() + 1, group).key) for share in (0.5, 0.99)
    ]
    summary = torch.stack([statistics.mean[0], *quantiles, statistics.maximum[0]])
    return torch.where(statistics.count > 0, summary, 0)


covariance_op = torch.library.custom_op(
    "spear_kernels::covariance",
    covariance_rows,
    mutates_args=(),
    schema="(Tensor logp, Tensor advantages, Tensor mask, str? group) -> Tensor",
)
summary_op = torch.library.custom_op(
    "spear_kernels::covariance_summary",
    covariance_summary,
    mutates_args=(),
    schema="(Tensor cov, Tensor mask, str? group) -> Tensor",
)
choose_op = torch.library.custom_op(
    "spear_kernels::covariance_choose",
    choose_rows,
    mutates_args=(),
    schema="(Tensor? cov, Tensor candidates, Tensor mask, Tensor seq_ids, Tensor positions, float cov_ratio, "
    "SymInt seed, str? group) -> Tensor",
)


@covariance_op.register_fake
def _(logp, advantages, mask, group):
    return torch.empty_like(logp, dtype=torch.float64)


@summary_op.register_fake
def _(cov, mask, group):
    return cov.new_empty(4)


@choose_op.register_fake
def _(cov, candidates, mask, seq_ids, positions, cov_ratio, seed, group):
    return torch.empty_like(candidates)
