"""What ranks tell each other, without starting any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from spear_fast.dist import Ranks
from spear_fast.errors import RankError

CPU = torch.device("cpu")


def test_shares_cover_everything_once_and_only_sharers_get_any():
    for size, count, sharers in [(1, 5, None), (4, 10, None), (4, 3, None), (4, 5, 2), (2, 5, 3)]:
        shares = [list(Ranks(rank, size, CPU).share(count, sharers)) for rank in range(size)]
        assert sorted(place for share in shares for place in share) == list(range(count))
        assert all(not share for share in shares[sharers or size :])
        busy = [len(share) for share in shares[: sharers or size]]
        assert max(busy) - min(busy) <= 1


@pytest.mark.parametrize("name", ["gather", "on_main", "barrier"])
def test_a_lost_rank_is_named_as_the_cause(monkeypatch, name):
    def lose(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    for call in ("all_gather_object", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, call, lose)
    group: Any = object()
    ranks = Ranks(0, 2, CPU, group)
    work = {"gather": lambda: ranks.gather(1), "on_main": lambda: ranks.on_main(lambda: 1), "barrier": ranks.barrier}
    with pytest.raises(RankError, match=r"another rank of this job ended.*Connection closed"):
        work[name]()
