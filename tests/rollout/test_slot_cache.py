"""Slots of the hf engine's cache: running ones stay contiguous, idle ones keep what a later turn can use."""

from __future__ import annotations

import torch

from spear_fast.rollout.slot_cache import SlotBatch, SlotCache, common_prefix


def fill(cache: SlotCache, index: int, tokens: list[int]) -> None:
    """Store for each token a key and value equal to its id."""
    where = torch.arange(len(tokens))[None]
    batch = SlotBatch(cache, index, where, torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool))
    content = torch.tensor(tokens, dtype=torch.float32).reshape(1, 1, -1, 1)
    cache.write(0, batch, content, content)
    cache.slots[index].tokens = list(tokens)


def stored(cache: SlotCache, index: int) -> list[int]:
    length = len(cache.slots[index].tokens)
    return cache._stores[0][0][index, :length, 0, 0].int().tolist()


def test_a_returning_trajectory_finds_its_prefix():
    cache = SlotCache(3, 8)
    for uid in (10, 11):
        assert cache.acquire(uid, [1, 2, 3]) == 0
        fill(cache, cache.num_running - 1, [1, 2, 3])
    cache.release(0)
    assert (cache.num_running, cache.slots[0].uid) == (1, 11)
    assert cache.acquire(10, [1, 2, 9, 9]) == 2
    assert stored(cache, 1) == [1, 2]


def test_release_moves_contents_with_the_slot():
    cache = SlotCache(3, 8)
    for uid in range(3):
        cache.acquire(uid, [uid] * (uid + 2))
        fill(cache, uid, [uid] * (uid + 2))
    cache.release(0)
    for index in range(3):
        slot = cache.slots[index]
        assert stored(cache, index) == slot.tokens == [slot.uid] * (slot.uid + 2)


def test_the_slot_idle_longest_is_given_away_and_empty_ones_first():
    cache = SlotCache(3, 8)
    for uid in (1, 2):
        cache.acquire(uid, [5])
        fill(cache, cache.num_running - 1, [5])
    cache.release(1)
    cache.release(0)
    cache.acquire(3, [5])
    assert {slot.uid for slot in cache.slots} == {1, 2, 3}
    cache.acquire(4, [5])
    assert {slot.uid for slot in cache.slots} == {1, 3, 4}


def test_at_least_one_token_is_left_to_compute():
    cache = SlotCache(1, 8)
    cache.acquire(1, [1, 2])
    fill(cache, 0, [1, 2, 3])
    cache.release(0)
    assert cache.acquire(1, [1, 2, 3]) == 2


def test_common_prefix():
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 5, 3], [1, 2, 3]) == 1
    assert common_prefix([], [1]) == 0
