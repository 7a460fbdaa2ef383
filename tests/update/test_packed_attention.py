"""Packed attention against a loop over sequences in float64, and its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spear_fast.update.attention import packed_attention, plan_attention, select_rows

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def random_qkv(lengths: list[int], heads: int = 4, kv_heads: int = 2, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), count, width) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def slow_attention(query, key, value, lengths, scale, window):
    """One sequence, one head, one token at a time."""
    outputs, start = [], 0
    repeat = query.shape[1] // key.shape[1]
    for length in lengths:
        for t in range(length):
            first = start if window is None else max(start, start + t - window + 1)
            seen = slice(first, start + t + 1)
            heads = []
            for h in range(query.shape[1]):
                weights = torch.softmax(key[seen, h // repeat] @ query[start + t, h] * scale, dim=0)
                heads.append(weights @ value[seen, h // repeat])
            outputs.append(torch.stack(heads))
        start += length
    return torch.stack(outputs)


@settings(max_examples=15)
@given(lengths=lengths_strategy, window=st.sampled_from([None, 1, 5]), scale=st.sampled_from([None, 0.3]))
def test_output_and_gradients_equal_the_slow_version(lengths, window, scale):
    tensors = random_qkv(lengths)
    output = packed_attention(*tensors, plan_attention(lengths, "cpu"), scale, window)
    expected = slow_attention(*tensors, lengths, 6**-0.5 if scale is None else scale, window)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((output * weight).sum(), tensors)
    for grad, truth in zip(actual, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(grad, truth)


@given(lengths=lengths_strategy)
def test_plan_gathers_each_sequence_in_order(lengths):
    plan = plan_attention(lengths, "cpu")
    total = sum(lengths)
    torch.testing.assert_close(plan.slot_token[plan.token_slot], torch.arange(total))
    assert plan.max_length == max(lengths)
    assert plan.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert sum(count for count, _ in plan.buckets) == len(lengths)
    assert len(plan.slot_token) == sum(count * length for count, length in plan.buckets)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    start = 0
    for count, length in plan.buckets:
        slots = plan.slot_token[start : start + count * length].view(count, length)
        assert (sequence[slots] == sequence[slots[:, :1]]).all(), "a row of a bucket mixes sequences"
        start += count * length


@given(lengths=lengths_strategy)
def test_padding_is_bounded(lengths):
    plan = plan_attention(lengths, "cpu")
    assert len(plan.slot_token) <= 1.25 * sum(lengths)


def test_equal_lengths_share_one_bucket_without_padding():
    plan = plan_attention([7, 7, 7], "cpu")
    assert plan.buckets == ((3, 7),) and len(plan.slot_token) == 21


def test_example_of_the_docstring():
    plan = plan_attention([4, 5], "cpu")
    assert plan.buckets == ((2, 5),)
    assert plan.slot_token.tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 3, 3]
    assert plan.token_slot.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4]


def test_select_rows_gradient():
    source = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: select_rows(x, torch.tensor([4, 0, 2])), source)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
        return result


@pytest.mark.parametrize("lengths", [[512] * 8, [300, 40, 1000, 7, 2749]])
def test_model_allocates_nothing_of_the_order_of_t_squared(policy, new_rows, lengths):
    from spear_fast.batching import collate

    rows = new_rows(lengths)
    batch = collate(rows, range(len(rows)), "cpu")
    with LargestTensor() as largest:
        policy.hidden_states(batch).sum().backward()
    tokens, widest = sum(lengths), 48
    assert tokens * widest <= largest.numel <= 1.25 * tokens * widest < tokens**2 / 50
