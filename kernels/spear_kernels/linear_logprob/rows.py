"""Rows in front of a head: their statistics and the gradients behind them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from spear_kernels.checks import host_may_wait
from spear_kernels.linear_logprob.head import Head, cut
from spear_kernels.linear_logprob.sums import GradientSums, Rows
from spear_kernels.logprob.matrix import partials_table, statistics_table, write_gradient
from spear_kernels.logprob.rows import Coefficients, RowStatistics, combine, merge
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
    index: torch.Tensor | None = None
    """The rows that are meant, in their order, int64 [n]; None: all N. Rows are gathered chunk by chunk."""
    unknown: torch.Tensor | None = None
    """bool [N], False for rows that may hold anything and pass as zeros, since the host does not know them."""

    def __len__(self) -> int:
        return len(self.ids if self.index is None else self.index)

    def places(self, rows: slice) -> Rows:
        """Where some of the rows that are meant lie among all N."""
        return rows if self.index is None else self.index[rows]

    def select(self, rows: torch.Tensor | None) -> HeadRows:
        """Some of the rows that are meant, int64; None takes all."""
        return self if rows is None else replace(self, index=rows if self.index is None else self.index[rows])

    def part(self, rows: slice) -> HeadRows:
        """Consecutive rows with their hidden states at hand."""
        places = self.places(rows)
        hidden, ids, scaling = self.hidden[places], self.ids[places], self.scaling.rows(places)
        if self.unknown is not None:
            mask = self.unknown[places]
            hidden, ids = hidden.masked_fill(~mask[:, None], 0), torch.where(mask, ids, 0)
            scaling = scaling.where(mask)
        return replace(self, hidden=hidden, ids=ids, scaling=scaling, index=None, unknown=None)

    def statistics(self, start: int = 0, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Statistics [4, n] of the rows from `start` on; their raw logits are left in `logits` [n, V] if given."""
        rows = slice(start, len(self))
        if logits is None and self.backend == "triton" and self._prefers_fused(rows):
            return self._fused_statistics(self.part(rows))
        chunks = cut(len(self) - start, self.head.rows_in(self.chunk_bytes, self.head.dtype))
        buffer = self.head.buffer(chunks[0].stop) if logits is None else logits
        table = torch.empty(4, len(self) - start, dtype=self.head.dtype, device=self.hidden.device)
        # The partial statistics of a shard are exchanged once for all chunks.
        summarise = statistics_table if self.shard.is_whole else partials_table
        for place in chunks:
            part = self.part(slice(start + place.start, start + place.stop))
            z = self.head.logits(part.hidden, buffer[: len(part)] if logits is None else logits[place])
            table[:, place] = summarise(z, part.ids, part.scaling, self.backend)
        return table if self.shard.is_whole else combine(self.shard.gather(table[None]))

    def _prefers_fused(self, rows: slice) -> bool:
        """Whether a fused forward without logits beats a matrix product into logits that a second kernel reads.

        By arithmetic, not yet by measurement: the traffic of the logits, 8 bytes each, outweighs what the fused product
        loses against the vendor's where a row of H products takes no longer than that, and where few rows leave the
        vendor's product short of work.
        """
        num_rows = rows.stop - rows.start
        fits = self.hidden.dtype == self.head.weight.dtype and self.head.width > 0 and num_rows > 0
        return fits and (self.hidden.shape[1] <= FUSED_MAX_WIDTH or num_rows <= FUSED_MAX_ROWS)

    def _fused_statistics(self, part: HeadRows) -> torch.Tensor:
        from spear_kernels.linear_logprob.launch import fused_partials

        shares = fused_partials(part.hidden, self.head.weight, self.head.bias, part.ids, *part.scaling.numbers)
        # Merged before they are sent: ranks may have cut their columns into different numbers of shares.
        return combine(self.shard.gather(merge(shares)[None]))

    def gradients(
        self, stop: int, write: Write, kept: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, HeadRows, torch.Tensor]]:
        """Chunks of the first `stop` rows: their places, rows and the gradient [n, V] of their logits.

        `write` is called for pieces of a chunk with storage for their logits, or with the logits in `kept` [stop, V].
        """
        head, splits = self.head, self.head.splits_gradient
        # Kept logits have taken three quarters of the budget already, if their gradient needs a matrix of its own.
        kept_apart = kept is not None and splits
        limit = head.rows_in(self.chunk_bytes // 4, head.gradient_dtype) if kept_apart else 0
        chunks = cut(stop, limit or head.gradient_rows(self.chunk_bytes))
        largest = chunks[0].stop
        pieces = head.logits_rows(self.chunk_bytes) if splits else largest
        buffer = kept if kept is not None and not splits else head.buffer(largest, head.gradient_dtype)
        logits = head.buffer(min(pieces, largest)) if splits and kept is None else buffer
        for chunk in chunks:
            part = self.part(chunk)
            out = buffer[chunk] if buffer is kept else buffer[: len(part)]
            for piece in cut(len(part), max(1, pieces)):
                place = slice(chunk.start + piece.start, chunk.start + piece.stop)
                own, target = part.part(piece), out[piece]
                z = target if not splits else logits[: len(own)] if kept is None else kept[place]
                write(place, own, z, target)
            yield chunk, part, out

    def add_gradients(
        self, sums: GradientSums, stats: RowStatistics, coefficients: Coefficients, kept: torch.Tensor | None = None
    ) -> None:
        """Add the gradients of sum(d_logp * logp + d_entropy * entropy) to `sums`; statistics and coefficients are [N].

        Raw logits `kept` [n, V] of the rows that are meant are destroyed; without them they are computed again, chunk
        by chunk. Rows without a coefficient cost nothing where the host may look (on the CPU).
        """
        rows = self
        if self.index is not None:
            stats, coefficients = stats.rows(self.index), take_coefficients(coefficients, self.index)
        live = live_rows(coefficients)
        if kept is None and live is not None:
            rows, stats, coefficients = self.select(live), stats.rows(live), take_coefficients(coefficients, live)

        def write(place: slice, part: HeadRows, logits: torch.Tensor, out: torch.Tensor) -> None:
            if kept is None:
                part.head.logits(part.hidden, logits)
            own = take_coefficients(coefficients, place)
            write_gradient(out, logits, part.ids, stats.rows(place), own, part.scaling, part.backend)

        for place, part, dz in rows.gradients(len(rows), write, kept):
            own = live_rows(take_coefficients(coefficients, place))
            sums.add_live(rows.places(place), part.hidden, dz, own)


Write = Callable[[slice, HeadRows, torch.Tensor, torch.Tensor], None]
"""write(place, part, logits, out) makes the gradient out [n, V] of the logits [n, V] of `part`, the rows at `place`.

`logits` and `out` are one storage where their types agree.
"""


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
