"""The gradients behind a head as sums over chunks of rows, in float32 or float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear_kernels.linear_logprob.head import Head
from spear_kernels.linear_logprob.products import add_outer_, project_back
from spear_kernels.logprob.rows import tiles
from spear_kernels.vocab_parallel import VocabShard

Rows = slice | torch.Tensor
"""Some rows: a range, or their places int64 [n]."""
Wanted = tuple[bool, bool, bool]
"""Whether hidden, weight and bias want a gradient."""


@dataclass
class GradientSums:
    """Gradients of hidden [N, H], weight [V, H] and bias [V]; None where not wanted."""

    head: Head
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @staticmethod
    def zeros(
        head: Head, hidden: torch.Tensor, weight: torch.Tensor, shard: VocabShard, wanted: Wanted
    ) -> GradientSums:
        """Zero sums of what is `wanted`; `weight` may have padding rows that `head` has not, which stay zero.

        The part of a shard in the gradient of hidden is not rounded to the type of hidden before all are added.
        """
        like = {"dtype": head.dtype, "device": hidden.device}
        hidden_dtype = hidden_sum_dtype(hidden, head.dtype) if shard.is_whole else head.dtype
        return GradientSums(
            head,
            torch.zeros(hidden.shape, dtype=hidden_dtype, device=hidden.device) if wanted[0] else None,
            torch.zeros(weight.shape, **like) if wanted[1] else None,
            torch.zeros(len(weight), **like) if wanted[2] else None,
        )

    def add(self, rows: Rows, x: torch.Tensor, dz: torch.Tensor) -> None:
        """Add a chunk: hidden states x [n, H] of `rows` and the gradient dz [n, V] of their logits."""
        width = self.head.width
        if self.hidden is not None:
            d_hidden = project_back(dz, self.head.weight, self.hidden.dtype).to(self.hidden.dtype)
            if isinstance(rows, slice):
                self.hidden[rows] = d_hidden
            else:
                self.hidden.index_copy_(0, rows, d_hidden)
        if self.weight is not None:
            add_outer_(self.weight[:width], dz, x)
        if self.bias is not None:
            self.bias[:width].add_(dz.sum(0, dtype=self.bias.dtype))

    def add_live(self, rows: Rows, x: torch.Tensor, dz: torch.Tensor, live: torch.Tensor | None) -> None:
        """`add` of the rows `live`, ascending places int64 in the chunk; their gradients move to the front of dz."""
        if live is None:
            self.add(rows, x, dz)
            return
        for place in tiles(len(live), dz.shape[1], dz.dtype, dz.device):
            # Places ascend, so a row moves forward onto rows already read.
            dz[place] = dz[live[place]]
        places = live + rows.start if isinstance(rows, slice) else rows[live]
        self.add(places, x[live], dz[: len(live)])

    def finish(self, hidden: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor | None, ...]:
        """The sums over all shards, the one of hidden in `hidden_sum_dtype`."""
        dtype = hidden_sum_dtype(hidden, self.head.dtype)
        total = None if self.hidden is None else shard.sum_(self.hidden).to(dtype)
        return total, self.weight, self.bias


def hidden_sum_dtype(hidden: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which the gradient of `hidden` waits for the factor of the loss: its own, but wider than float16.

    In float16 most of it would be 0 before a loss scale could reach it.
    """
    return dtype if hidden.dtype == torch.float16 else hidden.dtype
