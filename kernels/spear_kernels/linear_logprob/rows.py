"""Rows in front of a head: their statistics and the gradients behind them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from spear_kernels.checks import host_may_wait
from spear_kernels.linear_logprob.head import Head
from spear_kernels.linear_logprob.sums import GradientSums, Rows
from spear_kernels.logprob.matrix import partials_table, statistics_table, write_gradient
from spear_kernels.logprob.rows import Coefficients, RowStatistics, combine
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.vocab_parallel import VocabShard

FUSED_MAX_WIDTH = 1024
FUSED_MAX_ROWS = 128


@dataclass(frozen=True)
class HeadRows:
    """Hidden states [N, H] and the local columns of their tokens, int64 [N], in front of a head."""

    hidden: torch.Tensor
    ids: torch.Tensor
    head: Head
    scaling: Scaling
    shard: VocabShard
    backend: str
    chunk_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Rows | None) -> HeadRows:
        """Some of the rows; None takes all."""
        if rows is None:
            return self
        return replace(self, hidden=self.hidden[rows], ids=self.ids[rows], scaling=self.scaling.rows(rows))

    def neutral(self, mask: torch.Tensor) -> HeadRows:
        """The rows with harmless contents where mask [N] is False, for a host that does not know which to leave out."""
        hidden, ids = self.hidden.masked_fill(~mask[:, None], 0), torch.where(mask, self.ids, 0)
        return replace(self, hidden=hidden, ids=ids, scaling=self.scaling.where(mask))

    def chunks(self) -> Iterator[tuple[slice, HeadRows]]:
        """Consecutive parts whose logits fit the budget, with their places."""
        for rows in self.head.chunks(0, len(self), self.chunk_bytes):
            yield rows, self.take(rows)

    def buffer(self) -> torch.Tensor:
        """Storage for the logits of the largest chunk, [n, V]."""
        sizes = (rows.stop - rows.start for rows in self.head.chunks(0, len(self), self.chunk_bytes))
        return self.head.buffer(max(sizes, default=0))

    def gradient(self, logits: torch.Tensor, stats: RowStatistics, coefficients: Coefficients) -> torch.Tensor:
        """Gradient [N, V] of raw logits [N, V] in the head's gradient type; the logits are destroyed."""
        out = self.head.buffer(len(self), self.head.gradient_dtype) if self.head.splits_gradient else logits
        write_gradient(out, logits, self.ids, stats, coefficients, self.scaling, self.backend)
        return out

    def statistics(self, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Statistics [4, N]; the raw logits of all rows are left in `logits` [N, V] if it is given."""
        if logits is None and self.backend == "triton" and self._prefers_fused():
            return self._fused_statistics()
        buffer = self.buffer() if logits is None else logits
        table = torch.empty(4, len(self), dtype=self.head.dtype, device=self.hidden.device)
        # The partial statistics of a shard are exchanged once for all chunks.
        summarise = statistics_table if self.shard.is_whole else partials_table
        for rows, part in self.chunks():
            z = self.head.logits(part.hidden, buffer if logits is None else logits[rows])
            table[:, rows] = summarise(z, part.ids, part.scaling, self.backend)
        return table if self.shard.is_whole else combine(self.shard.gather(table[None]))

    def _prefers_fused(self) -> bool:
        """Whether a fused forward without logits beats a matrix product into logits that a second kernel reads.

        By arithmetic, not yet by measurement: the traffic of the logits, 8 bytes each, outweighs what the fused product
        loses against the vendor's where a row of H products takes no longer than that, and where few rows leave the
        vendor's product short of work.
        """
        fits = self.hidden.dtype == self.head.weight.dtype and self.head.width > 0 and len(self) > 0
        return fits and (self.hidden.shape[1] <= FUSED_MAX_WIDTH or len(self) <= FUSED_MAX_ROWS)

    def _fused_statistics(self) -> torch.Tensor:
        from spear_kernels.linear_logprob.launch import fused_partials

        partials = fused_partials(self.hidden, self.head.weight, self.head.bias, self.ids, *self.scaling.numbers)
        return combine(self.shard.gather(partials))

    def add_gradients(
        self, sums: GradientSums, stats: RowStatistics, coefficients: Coefficients, logits: torch.Tensor | None = None
    ) -> None:
        """Add the gradients of sum(d_logp * logp + d_entropy * entropy) to `sums`, which has a row for each row here.

        Raw `logits` [N, V] are destroyed; without them they are computed again, chunk by chunk. Rows without a
        coefficient cost nothing where the host may look (on the CPU).
        """
        live = live_rows(coefficients)
        if logits is not None:
            dz = self.gradient(logits, stats, coefficients)
            sums.add_live(slice(0, len(self)), self.hidden, dz, live)
            return
        rows, coefficients = self.take(live), take_coefficients(coefficients, live)
        stats = stats if live is None else stats.rows(live)
        buffer = rows.buffer()
        for place, part in rows.chunks():
            z = self.head.logits(part.hidden, buffer)
            dz = part.gradient(z, stats.rows(place), take_coefficients(coefficients, place))
            sums.add(place if live is None else live[place], part.hidden, dz)


def live_rows(coefficients: Coefficients) -> torch.Tensor | None:
    """Indices of rows with a coefficient other than zero, or None when all rows are kept (always, off the CPU)."""
    if not host_may_wait(coefficients[0]):
        return None
    flags = alive(coefficients)
    live = flags.nonzero()[:, 0]
    return None if len(live) == len(flags) else live


def alive(coefficients: Coefficients) -> torch.Tensor:
    """Whether a row has a coefficient other than zero, bool [n]."""
    d_logp, d_entropy = coefficients
    return d_logp != 0 if d_entropy is None else (d_logp != 0) | (d_entropy != 0)


def take_coefficients(coefficients: Coefficients, rows: Rows | None) -> Coefficients:
    """The coefficients of some rows; None takes all."""
    d_logp, d_entropy = coefficients
    return coefficients if rows is None else (d_logp[rows], None if d_entropy is None else d_entropy[rows])
