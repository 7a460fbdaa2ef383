"""Splits by hash: disjoint, independent of pool sizes and request order, and an error when exhausted."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.envs.pools import Pools
from spear_fast.envs.splits import SHARES, Split, split_of, unit_hash
from spear_fast.errors import ConfigError, TaskError


def make_pools(largest: int, **sizes: int) -> Pools[int]:
    """Pools of numbers up to `largest`; odd draws bring nothing, and n and n + 1/2 of a pair share a key."""

    def generate(split: Split, draw: int) -> int | None:
        return None if draw % 2 else Random(f"{split} {draw}").randint(0, largest)

    return Pools("numbers", {"train": 0, "eval": 0, "demo": 0} | sizes, generate, lambda n: str(n // 2), str)


@given(st.text())
def test_hash_is_a_stable_share_of_one(text: str) -> None:
    assert 0 <= unit_hash(text) < 1
    assert unit_hash(text) == unit_hash(text)


def test_splits_get_their_shares() -> None:
    counts = Counter(split_of(f"problem {number}") for number in range(20_000))
    for split, share in SHARES.items():
        # Three standard deviations of a binomial count are below 0.011.
        assert counts[split] / 20_000 == pytest.approx(share, abs=0.011)


def test_pools_are_disjoint_in_key_and_eval_is_distinct() -> None:
    pools = make_pools(10_000, train=500, eval=300, demo=300)
    drawn = {split: [pools.get(split, index) for index in range(pools.size(split))] for split in SHARES}
    keys = {split: {number // 2 for number in numbers} for split, numbers in drawn.items()}
    assert not keys["train"] & keys["eval"]
    assert not keys["train"] & keys["demo"]
    assert not keys["eval"] & keys["demo"]
    assert len(set(drawn["eval"])) == 300


def test_problem_depends_on_its_index_only() -> None:
    small, large = make_pools(10_000, train=10, eval=5), make_pools(10_000, train=500, eval=50)
    assert [large.get("train", index) for index in (7, 3)] == [small.get("train", index) for index in (7, 3)]
    assert [large.get("eval", index) for index in range(5)] == [small.get("eval", index) for index in range(5)]


def test_exhausted_eval_names_the_parameter() -> None:
    with pytest.raises(ConfigError, match=r"task\.params\.num_eval=50: only \d+ different"):
        make_pools(100, eval=50)


def test_empty_split_is_an_error() -> None:
    empty = next(split for split in ("train", "demo") if split_of("0") != split)
    with pytest.raises(ConfigError, match=empty):
        make_pools(1, **{empty: 1})


def test_unknown_split_and_index_are_errors() -> None:
    pools = make_pools(100, train=3)
    with pytest.raises(TaskError, match=r"no split 'test'; it has train, eval, demo"):
        pools.size("test")
    for index in (-1, 3):
        with pytest.raises(TaskError, match=f"task {index} is outside split 'train'.*3 tasks"):
            pools.get("train", index)
