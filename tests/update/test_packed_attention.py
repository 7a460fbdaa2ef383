"""Packed attention of each back-end against a loop over sequences in float64, and its memory."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spear_fast.batching import collate
from spear_fast.batching.repeats import find_repeats
from spear_fast.errors import ConfigError
from spear_fast.types import Segments
from spear_fast.update import attention
from spear_fast.update.attention import choose_attention, packed_attention, plan_attention, select_rows
from spear_fast.update.flex import block_mask

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
"""Whole sequences."""
GROUPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), max_size=4)), min_size=1, max_size=5)
"""(length, lengths of what follows) of prompts; a sequence of its own where nothing follows."""
BACKENDS = ("sdpa", "flash")
"""What has a backward pass here: flash-attn by the stand-in below."""


def segments_of(groups: list[tuple[int, list[int]]]) -> Segments:
    lengths, prefix = [], []
    for prompt, rests in groups:
        first = len(lengths)
        lengths += [prompt, *rests]
        prefix += [-1, *([first] * len(rests))]
    return Segments.of(lengths, prefix)


def random_qkv(num_tokens: int, heads: int = 4, kv_heads: int = 2, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, count, width) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def slow_attention(query, key, value, segments, scale, window):
    """One segment, one token, one head at a time."""
    outputs, repeat = [], query.shape[1] // key.shape[1]
    for start, length, prefix in zip(segments.start, segments.length, segments.prefix, strict=True):
        sequence = list(range(start, start + length))
        if prefix >= 0:
            first = segments.start[prefix]
            sequence = list(range(first, first + segments.length[prefix])) + sequence
        for t in range(len(sequence) - length, len(sequence)):
            seen = sequence[0 if window is None else max(0, t - window + 1) : t + 1]
            heads = []
            for h in range(query.shape[1]):
                weights = torch.softmax(key[seen, h // repeat] @ query[sequence[t], h] * scale, dim=0)
                heads.append(weights @ value[seen, h // repeat])
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


def flash_stand_in(query, key, value, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
    """What flash-attn's documentation says of flash_attn_varlen_func since 2.1: the diagonal ends lower right."""
    assert causal and cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs = []
    bounds = [cu[1:-1].long() for cu in (cu_q, cu_k, cu_k)]
    pieces = (t.tensor_split(cu) for t, cu in zip((query, key, value), bounds, strict=True))
    for q, k, v in zip(*pieces, strict=True):
        ahead = len(k) - len(q)
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(ahead)
        mask = mask if window_size[0] < 0 else mask.triu(ahead - window_size[0])
        parts = (part.transpose(0, 1)[None] for part in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=softmax_scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention._flash_varlen.cache_clear()
    yield
    attention._flash_varlen.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=GROUPS, window=st.sampled_from([None, 1, 5, 40]), scale=st.sampled_from([None, 0.3]))
def test_output_and_gradients_equal_the_slow_version(backend, groups, window, scale):
    segments = segments_of(groups)
    tensors = random_qkv(int(segments.length.sum()))
    output = packed_attention(*tensors, plan_attention(segments, "cpu", backend), scale, window)
    expected = slow_attention(*tensors, segments, 6**-0.5 if scale is None else scale, window)
    torch.testing.assert_close(output, expected)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((output * weight).sum(), tensors)
    for grad, truth in zip(actual, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("window", [None, 150])
@settings(max_examples=2)
@given(groups=GROUPS, scale=st.sampled_from([None, 0.3]))
def test_flex_equals_sdpa(window, groups, scale):
    # Long enough for blocks of the mask inside one segment, inside a prompt, and across several.
    for segments in (segments_of(groups), segments_of([(260, [140, 3]), *groups])):
        tensors = [tensor.detach() for tensor in random_qkv(int(segments.length.sum()), heads=2, kv_heads=1)]
        output = packed_attention(*tensors, plan_attention(segments, "cpu", "flex"), scale, window)
        expected = packed_attention(*tensors, plan_attention(segments, "cpu", "sdpa"), scale, window)
        torch.testing.assert_close(output, expected)


@settings(max_examples=10)
@given(groups=GROUPS, window=st.sampled_from([None, 5, 150]))
def test_blocks_of_the_flex_mask_are_exact(groups, window):
    """A block that holds a visible pair must be listed, and one listed as whole must hold no other."""
    segments = segments_of([(300, [200, 3, 140]), *groups])
    mask = block_mask(plan_attention(segments, "cpu", "flex"), window)
    num_tokens = int(segments.length.sum())
    place = torch.arange(num_tokens)
    pairs = mask.mask_mod(place[:1], place[:1], place[:, None], place[None, :])
    side = -(-num_tokens // 128)
    padded = torch.zeros(side * 128, side * 128, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = pairs
    blocks = padded.unflatten(1, (side, 128)).unflatten(0, (side, 128)).transpose(1, 2)
    partial, whole = (
        [set(row[:count].tolist()) for count, row in zip(counts[0, 0].tolist(), table[0, 0], strict=True)]
        for counts, table in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    for q in range(side):
        assert not partial[q] & whole[q]
        for k in range(side):
            assert not blocks[q, k].any() or k in partial[q] | whole[q]
            assert k not in whole[q] or blocks[q, k].all()
    assert window is not None or any(whole)


@given(lengths=LENGTHS)
def test_plan_gathers_each_sequence_in_order(lengths):
    plan = plan_attention(Segments.of(lengths), "cpu")
    total = sum(lengths)
    assert plan.keys is plan.queries and plan.keys.repeats == ()
    torch.testing.assert_close(plan.queries.token[plan.queries.slot], torch.arange(total))
    assert sum(count for count, _, _ in plan.buckets) == len(lengths)
    assert len(plan.queries.token) == sum(count * length for count, length, _ in plan.buckets)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    start = 0
    for count, length, before in plan.buckets:
        slots = plan.queries.token[start : start + count * length].view(count, length)
        assert (sequence[slots] == sequence[slots[:, :1]]).all() and before == 0, "a row of a bucket mixes sequences"
        start += count * length


@given(lengths=LENGTHS)
def test_padding_is_bounded(lengths):
    plan = plan_attention(Segments.of(lengths), "cpu")
    assert len(plan.queries.token) <= 1.25 * sum(lengths)


def test_equal_lengths_share_one_bucket_without_padding():
    plan = plan_attention(Segments.of([7, 7, 7]), "cpu")
    assert plan.buckets == ((3, 7, 0),) and len(plan.queries.token) == 21


def test_example_of_the_docstring():
    plan = plan_attention(Segments.of([4, 5]), "cpu")
    assert plan.buckets == ((2, 5, 0),)
    assert plan.queries.token.tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 3, 3]
    assert plan.queries.slot.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4]


def test_select_rows_gradient():
    source = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: select_rows(x, torch.tensor([4, 0, 2])), source)


@settings(max_examples=30)
@given(index=st.lists(st.integers(0, 5), min_size=1, max_size=14))
def test_select_rows_gradient_of_repeated_rows(index):
    source = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    repeats = find_repeats(np.array(index), "cpu")
    assert torch.autograd.gradcheck(lambda x: select_rows(x, torch.tensor(index), repeats), source)
    assert sorted(row for rows, _ in repeats for row in rows.tolist()) == sorted(
        row for row in set(index) if index.count(row) > 1
    )


def test_gradients_of_a_shared_prompt_add_up_in_float32():
    """Eight equal contributions are exact then; adding them one after the other in bfloat16 would round."""
    plan = plan_attention(segments_of([(1, [1] * 64)]), "cpu")
    key = torch.ones(65, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    attention._to_slots(key, plan.keys).mul(1.0078125).sum().backward()
    assert key.grad is not None and key.grad[0].item() == torch.tensor(65 * 1.0078125).bfloat16().item()


def test_choose_attention_by_what_works(monkeypatch):
    half, single = torch.bfloat16, torch.float32
    assert choose_attention("auto", "cpu", half, 64) == "sdpa"
    assert choose_attention("auto", "cuda", half, 64) == choose_attention("flash", "cuda:1", half, 64) == "flash"
    assert choose_attention("auto", "cuda", single, 64) == choose_attention("auto", "cuda", half, 20) == "flex"
    assert choose_attention("auto", "cuda", single, 8) == choose_attention("sdpa", "cuda", half, 64) == "sdpa"
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert choose_attention("auto", "cuda", half, 64) == "flex"
    for where, reason in (
        (("flash", "cuda", half, 64), r"flash-attn is not installed \(pip install 'spear-fast\[flash\]'\)"),
        (("flash", "cpu", half, 64), "runs on CUDA, and the policy is on cpu"),
        (("flash", "cuda", single, 64), "the forward pass is in float32"),
        (("flash", "cuda", half, 20), "these have 20"),
        (("flex", "cuda", half, 8), "these have 8"),
        (("flex", "cpu", half, 64), "no backward pass on the CPU"),
    ):
        with pytest.raises(ConfigError, match=f"='{where[0]}' cannot work.*{reason}.*set model.attention=auto"):
            choose_attention(*where)


def test_compiled_code_is_not_compiled_anew_for_each_plan():
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module

    block = torch.compile(lambda q, k, v, plan: packed_attention(2 * q, k, v, plan) + 1, backend=keep)
    counts = []
    for groups in ([(5, [])], [(3, [2, 9]), (30, [])], [(4, [20]), (7, [2, 3]), (1, [])], [(2, [1, 5]), (9, [8])]):
        segments = segments_of(groups)
        plan = plan_attention(segments, "cpu")
        query, key, value = (tensor.detach() for tensor in random_qkv(int(segments.length.sum())))
        torch.testing.assert_close(block(query, key, value, plan), packed_attention(2 * query, key, value, plan) + 1)
        counts.append(len(graphs))
    assert 0 < counts[1] == counts[-1]


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
    rows = new_rows(lengths)
    batch = collate(rows, range(len(rows)), "cpu")
    with LargestTensor() as largest:
        policy.hidden_states(batch).sum().backward()
    tokens, widest = sum(lengths), 48
    assert tokens * widest <= largest.numel <= 1.25 * tokens * widest < tokens**2 / 50


def test_heads_of_keys_are_repeated_where_no_kernel_takes_fewer(monkeypatch):
    """On CUDA, SDPA would hold all scores of a masked bucket."""
    segments = segments_of([(9, [4, 6]), (12, [])])
    query, key, value = random_qkv(int(segments.length.sum()))
    plan, passes = plan_attention(segments, "cpu"), []
    for few in (True, False):
        monkeypatch.setattr(attention, "_takes_fewer_keys", lambda *_, few=few, **__: few)
        output = packed_attention(query, key, value, plan, window=5)
        passes.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    for grouped, repeated in zip(*passes, strict=True):
        torch.testing.assert_close(repeated, grouped)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "masked", "takes"),
    [
        ("cuda", torch.bfloat16, 128, False, True),
        ("cuda", torch.bfloat16, 128, True, False),
        ("cuda", torch.float32, 128, False, False),
        ("cuda", torch.bfloat16, 512, False, False),
        ("cpu", torch.float32, 512, True, True),
    ],
)
def test_which_kernels_take_fewer_heads_of_keys(device, dtype, head_dim, masked, takes):
    assert attention._takes_fewer_keys(device, dtype, head_dim, masked=masked) == takes
