"""Sums and maxima over the ranks of a process group that is known by its name; without a name nothing is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_name(group: ProcessGroup | None) -> str | None:
    """The name under which an operator finds `group` again; None when there is nobody to talk to."""
    return None if group is None or group.size() == 1 else group.group_name


def resolve_group(name: str) -> ProcessGroup:
    """The group of that name."""
    # The public functions of torch.distributed take no name; torch's functional collectives resolve it with this one.
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]

    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]


def all_sum(values: torch.Tensor, group: str | None) -> torch.Tensor:
    """The sum of `values` over all ranks, written over `values`; the host does not wait for it on CUDA."""
    if group is not None:
        import torch.distributed as dist

        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=resolve_group(group))
    return values


def all_max(values: torch.Tensor, group: str | None) -> torch.Tensor:
    """The elementwise maximum of `values` over all ranks, written over `values`; NaN must not occur in it."""
    if group is not None:
        import torch.distributed as dist

        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=resolve_group(group))
    return values


def sum_of_earlier_ranks(value: torch.Tensor, group: str | None) -> torch.Tensor:
    """The sum of a 0-d `value` over the ranks before this one."""
    if group is None:
        return torch.zeros_like(value)
    members = resolve_group(group)
    by_rank = value.new_zeros(members.size())
    by_rank[members.rank()] = value
    return all_sum(by_rank, group)[: members.rank()].sum()
