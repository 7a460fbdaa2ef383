"""Which rows of all ranks are chosen: the first `count` candidates by covariance, by the draw, then by rank and row."""

from __future__ import annotations

import torch

from spear_kernels.cov_select.draw import priorities
from spear_kernels.cov_select.radix import kth_smallest, ordered_key
from spear_kernels.ranks import all_sum, sum_of_earlier_ranks


def _first_rows(rows: torch.Tensor, count: torch.Tensor, group: str | None) -> torch.Tensor:
    """The first `count` (0-d) rows of bool `rows` [N], counting through rank 0, rank 1, ..."""
    place = rows.cumsum(0)
    return rows & (place + sum_of_earlier_ranks(rows.sum(), group) <= count)


def choose_rows(
    cov: torch.Tensor | None,
    candidates: torch.Tensor,
    mask: torch.Tensor,
    seq_ids: torch.Tensor,
    positions: torch.Tensor,
    cov_ratio: float,
    seed: int,
    group: str | None,
) -> torch.Tensor:
    """max(1, floor(cov_ratio * n)) of the candidates, bool [N]; n is the number of rows with mask True on all ranks.

    Those of largest `cov` float64 [N] if it is given, then those of smallest draw; candidates, mask bool [N]; seq_ids,
    positions int64 [N]. Fewer are chosen only if there are fewer candidates.
    """
    num_tokens = all_sum(mask.sum(), group)
    wanted = torch.floor(num_tokens.double() * cov_ratio).clamp(min=1).long()
    keys = [priorities(seed, seq_ids, positions)]
    if cov is not None:
        # Unlike -cov, 0.0 - cov is never -0.0, which would come before 0.0. NaN, of either sign, comes last.
        keys.insert(0, ordered_key((0.0 - cov).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)))
    chosen, undecided = torch.zeros_like(candidates), candidates
    for key in keys:
        threshold = kth_smallest(key, undecided, wanted, group)
        chosen = chosen | (undecided & (key < threshold.key))
        undecided, wanted = threshold.ties, threshold.remaining
    return chosen | _first_rows(undecided, wanted, group)
