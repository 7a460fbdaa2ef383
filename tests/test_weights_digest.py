"""Digests of weights: any change of bits or order changes them, layout in memory does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spear_fast import weights_digest
from spear_fast.weights_digest import Digests, digest

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def short_period(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys that repeat after 8 words and blocks of 4, so that small tensors reach every boundary."""
    monkeypatch.setattr(weights_digest, "_PERIOD", 8)
    monkeypatch.setattr(weights_digest, "_CPU_BLOCK", 4)
    weights_digest._keys.cache_clear()
    yield
    weights_digest._keys.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 131])
@pytest.mark.usefixtures("short_period")
def test_a_change_of_any_element_changes_it(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    tensor = torch.randn(size).to(dtype)
    seen = {digest(tensor)}
    for index in range(size):
        changed = tensor.clone()
        changed.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[index] ^= 1
        seen.add(digest(changed))
    assert len(seen) == size + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("short_period")
def test_order_matters_within_words_and_across_boundaries(dtype: torch.dtype) -> None:
    tensor = torch.arange(100).to(dtype)
    seen = {digest(tensor)}
    for other in range(1, 100):
        swapped = tensor.clone()
        swapped[[0, other]] = swapped[[other, 0]]
        seen.add(digest(swapped))
    assert len(seen) == 100


def test_words_that_fold_to_complements_differ() -> None:
    """A shift that keeps the sign would map both to one value."""
    assert digest(torch.tensor([5])) != digest(torch.tensor([~5]))


def test_swapped_words_differ_even_where_their_keys_are_alike() -> None:
    """Keys that agree in 17 low bits, and words that differ in bit 47 alone: their products agree modulo 2^64."""
    seen: dict[int, int] = {}
    for index, key in enumerate(weights_digest._keys(torch.device("cpu"))[:5000].tolist()):
        other = seen.setdefault(key & 0x1FFFF, index)
        if other != index:
            break
    else:
        pytest.fail("no two keys are alike")
    words = torch.zeros(2, 5000, dtype=torch.int64)
    words[0, index] = words[1, other] = 1 << 47
    assert digest(words[0]) != digest(words[1])


def test_bits_count_and_not_values() -> None:
    zeros = torch.tensor([0.0, -0.0, 1.0])
    assert digest(zeros) != digest(zeros.abs())
    assert digest(torch.full((3,), torch.nan)) == digest(torch.full((3,), torch.nan))
    assert digest(torch.tensor([torch.nan, 1.0])) != digest(torch.tensor([1.0, torch.nan]))


def test_length_and_element_size_count_even_for_zeros() -> None:
    shapes = [torch.zeros(n, dtype=dtype) for n in (0, 1, 2, 3, 4, 8) for dtype in DTYPES]
    assert len({digest(tensor) for tensor in shapes}) == len(shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("short_period")
def test_place_and_strides_in_memory_do_not_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(9, 11).to(dtype)
    larger = torch.zeros(130, dtype=dtype)
    for start in range(4):
        larger[start : start + 99] = tensor.reshape(-1)
        assert digest(larger[start : start + 99]) == digest(tensor)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor.t()) != digest(tensor)


def test_real_blocks_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest may not depend on how the CPU cuts its work: a GPU does not cut it."""
    tensor = torch.randn(2 * (1 << 20) + 70_001)  # more than one period of words, and an incomplete word
    expected = digest(tensor)
    monkeypatch.setattr(weights_digest, "_CPU_BLOCK", 1 << 20)
    assert digest(tensor) == expected


def test_many_are_read_together() -> None:
    tensors = {"a": torch.randn(5), "b": torch.zeros(0), "c": torch.randn(3).bfloat16()}
    digests = Digests()
    for name, tensor in tensors.items():
        digests.add(name, tensor)
    assert list(digests.result().items()) == [(name, digest(tensor)) for name, tensor in tensors.items()]
    assert Digests().result() == {}
