"""Which rows enter the head, decided before any product; only what lies on the host can be looked at for free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear_kernels.checks import host_may_wait, to_device


def order_and_count(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, those with flag bool [n] True first and in order, int64 [n], and how many those are, int32 [1]."""
    order = torch.argsort(~flags, stable=True)
    return order, flags.sum(dtype=torch.int32).reshape(1)


@dataclass(frozen=True)
class RowPlan:
    """The rows that enter the head and their order.

    Example: mask [T, F, T, T] and live [T, T, F, T] give index [0, 3, 2] with num_live 2: row 1 never enters, and the
    backward products leave out row 2.
    """

    num_rows: int
    """Rows there are, N."""
    index: torch.Tensor | None
    """Places of the rows that enter, int64 [n]; None: all of them in order."""
    num_live: int
    """The first `num_live` of those may have a gradient."""
    unknown: torch.Tensor | None
    """bool [N] on the device, False for rows that count for nothing but that the host does not know."""
    count: torch.Tensor | None = None
    """int32 [1] on the device: how many rows of `index` really enter; None: all."""

    @staticmethod
    def of(mask: torch.Tensor | None, live: torch.Tensor | None, num_rows: int, device: torch.device) -> RowPlan:
        """Plan for mask bool [N] and rows whose gradient may be other than zero, live bool [N]; None means all.

        Masks on the CPU are read, those on another device are not.
        """
        if mask is not None and not host_may_wait(mask):
            return RowPlan(num_rows, None, num_rows, mask)
        if live is not None and not host_may_wait(live):
            live = None
        if mask is None and live is None:
            return RowPlan(num_rows, None, num_rows, None)
        entering = torch.ones(num_rows, dtype=torch.bool) if mask is None else mask
        first = entering if live is None else entering & live
        index = torch.cat([first.nonzero()[:, 0], (entering & ~first).nonzero()[:, 0]])
        num_live = int(first.sum())
        if num_live == num_rows:
            return RowPlan(num_rows, None, num_rows, None)
        return RowPlan(num_rows, to_device(index, device), num_live, None)

    def counted(self) -> RowPlan:
        """The plan with the rows that enter in front and counted on the device, if the host does not know them."""
        if self.unknown is None:
            return self
        order, count = order_and_count(self.unknown)
        return RowPlan(self.num_rows, order, self.num_rows, None, count)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values [..., n] of the rows that enter at their places among all rows, [..., N]; zeros elsewhere."""
        if self.index is not None:
            return values.new_zeros(*values.shape[:-1], self.num_rows).index_copy_(-1, self.index, values)
        return values if self.unknown is None else torch.where(self.unknown, values, 0)
