"""Statistics of a vocabulary that is spread over the ranks of a process group: one small all-gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spear_kernels.ranks import all_max, all_sum, resolve_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns `offset` .. `offset + width - 1` of the vocabulary; an empty `group` means all columns."""

    group: str = ""
    """Name of the process group, which is what operators of a compiled graph can carry."""
    offset: int = 0
    even_ranks: int = 1
    """Ranks, if all hold the same number of columns, padding included; else 0."""

    @staticmethod
    def of(group: ProcessGroup | None, vocab_offset: int | None, width: int) -> VocabShard:
        """The shard of this rank; by default every rank holds `width` columns, in the order of ranks.

        Raises:
            ValueError: vocab_offset without group, or negative.
        """
        if group is None or (group.size() == 1 and not vocab_offset):
            if group is None and vocab_offset is not None:
                raise ValueError(f"vocab_offset={vocab_offset} has no meaning without group; leave it None")
            return VocabShard()
        if vocab_offset is not None and vocab_offset < 0:
            raise ValueError(f"vocab_offset={vocab_offset} must be >= 0, the first token id of this rank's columns")
        if vocab_offset is not None:
            return VocabShard(group.group_name, vocab_offset, 0)
        return VocabShard(group.group_name, group.rank() * width, group.size())

    def total(self, vocab_size: int | None, width: int) -> int | None:
        """Columns of the whole vocabulary, if known: `vocab_size` of all, or `width` columns of every rank."""
        if self.is_whole:
            return width if vocab_size is None else vocab_size
        return width * self.even_ranks if self.even_ranks else None

    @property
    def is_whole(self) -> bool:
        """Whether there is nobody to share with."""
        return not self.group

    def local_size(self, vocab_size: int | None, width: int) -> int:
        """How many of this rank's columns lie below the global vocab_size."""
        return width if vocab_size is None else min(max(vocab_size - self.offset, 0), width)

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Column of each global id [N] on this rank; outside its columns if another rank holds it."""
        return ids - self.offset if self.offset else ids

    def gather(self, partials: torch.Tensor) -> torch.Tensor:
        """The partial statistics [S, 4, n] of all ranks' parts, one rank after another, from this rank's."""
        if self.is_whole:
            return partials
        import torch.distributed as dist

        group = resolve_group(self.group)
        everyone = partials.new_empty(group.size() * len(partials), *partials.shape[1:])
        dist.all_gather(list(everyone.chunk(group.size())), partials.contiguous(), group=group)
        return everyone

    def widest(self, width: int) -> int:
        """The largest number of columns of any rank, so that all cut their rows alike; waits if shards are uneven."""
        if self.is_whole or self.even_ranks:
            return width
        import torch.distributed as dist

        device = torch.device("cuda" if dist.get_backend(resolve_group(self.group)) == "nccl" else "cpu")
        return int(all_max(torch.tensor(width, device=device), self.group))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor` over the ranks, in place."""
        return all_sum(tensor, None if self.is_whole else self.group)
