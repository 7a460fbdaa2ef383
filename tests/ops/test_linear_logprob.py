"""linear_logprob: same numbers as the full logits, in chunks, without ever holding [N, V]."""

from __future__ import annotations

import pytest
import torch

from spear_kernels import linear_logprob
from spear_kernels.linear_logprob import linear_logprob_reference
from spear_kernels.testing import OperationRecorder, assert_close_to_truth, head_problem


def gradients(function, problem, d_logp, d_entropy, dtype=torch.float64, **options):
    inputs = [getattr(problem, name).to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    out = function(inputs[0], inputs[1], problem.ids, problem.temperature, bias=inputs[2], **options)
    loss = (d_logp * out.logp).sum() + (d_entropy * out.entropy).sum()
    return out, torch.autograd.grad(loss, inputs)


def test_gradcheck():
    p = head_problem(5, 3, 7)
    inputs = tuple(tensor.requires_grad_() for tensor in (p.hidden, p.weight, p.bias))

    def function(hidden, weight, bias):
        return linear_logprob(hidden, weight, p.ids, p.temperature, bias=bias, chunk_bytes=2 * 7 * 8)

    def definition(hidden, weight, bias):
        return linear_logprob_reference(hidden, weight, p.ids, p.temperature, bias, softcap=3.0, vocab_size=6)

    assert torch.autograd.gradcheck(function, inputs)
    p.ids %= 6
    assert torch.autograd.gradcheck(definition, inputs)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 23, 1000])
def test_chunks_do_not_change_the_result(rows_per_chunk):
    p = head_problem()
    d_logp, d_entropy = torch.randn(23).double(), torch.randn(23).double()
    out, grads = gradients(linear_logprob, p, d_logp, d_entropy, chunk_bytes=rows_per_chunk * 37 * 8)
    truth, true_grads = gradients(linear_logprob_reference, p, d_logp, d_entropy)
    for actual, expected in zip((*out, *grads), (*truth, *true_grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_against_float64(dtype):
    p = head_problem(40, 32, 501)
    for name in ("hidden", "weight", "bias"):
        setattr(p, name, getattr(p, name).to(dtype).double())
    ones = torch.ones(40)
    truth, true_grads = gradients(linear_logprob_reference, p, ones, ones)
    naive, naive_grads = gradients(linear_logprob_reference, p, ones, ones, dtype)
    out, grads = gradients(linear_logprob, p, ones, ones, dtype, chunk_bytes=7 * 501 * 4)
    assert out.logp.dtype == out.entropy.dtype == torch.float32
    for actual, exact, plain in zip((*out, *grads), (*truth, *true_grads), (*naive, *naive_grads), strict=True):
        assert_close_to_truth(actual, exact, plain)


def test_half_precision_logits_are_not_rounded():
    """bf16 logits put about 0.03 nat of noise on logp; float32 logits of the same inputs do not."""
    p = head_problem(64, 64, 301)
    hidden, weight = p.hidden.bfloat16(), p.weight.bfloat16() * 4
    truth = linear_logprob_reference(hidden.double(), weight.double(), p.ids)
    out = linear_logprob(hidden, weight, p.ids)
    assert (out.logp - truth.logp).abs().max() < 1e-4
    rounded = linear_logprob_reference(hidden, weight, p.ids)
    assert (rounded.logp - truth.logp).abs().max() > 1e-2


def test_bf16_weight_gradient_is_accumulated_in_float32():
    """Many chunks adding small parts to a bf16 sum would lose them all once the sum is 256 times larger."""
    num_rows = 768
    hidden = torch.full((num_rows, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(num_rows, dtype=torch.int64)
    linear_logprob(hidden, weight, ids, chunk_bytes=2 * 4).logp.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [num_rows / 2, -num_rows / 2]


# Logits that fit the budget are kept, so the products are 2 forward and 2 for hidden; else 2 more compute them again.
@pytest.mark.parametrize(("chunk_bytes", "products"), [(None, 4), (5 * 37 * 8, 6)])
def test_frozen_weight_gets_no_gradient_and_no_product(chunk_bytes, products):
    p = head_problem()
    hidden = p.hidden.requires_grad_()
    with OperationRecorder() as seen:
        linear_logprob(hidden, p.weight, p.ids, chunk_bytes=chunk_bytes).logp.sum().backward()
    assert p.weight.grad is None
    assert seen.matrix_flops == products * p.hidden.numel() * len(p.weight)


def test_kept_logits_save_the_recomputation_and_rows_without_gradient_their_products():
    p = head_problem()
    d_logp = torch.ones(23)
    d_logp[:8] = 0

    def flops(**options):
        with OperationRecorder() as seen:
            gradients(linear_logprob, p, d_logp, torch.zeros(23), **options)
        return seen.matrix_flops / (p.hidden.numel() * len(p.weight))

    assert flops() == pytest.approx(2 + 4 * 15 / 23)
    assert flops(chunk_bytes=5 * 37 * 8) == pytest.approx(2 + 6 * 15 / 23)


@pytest.mark.parametrize("chunk_bytes", [None, 5 * 37 * 8])
def test_backward_repeats(chunk_bytes):
    p = head_problem()
    inputs = [tensor.requires_grad_() for tensor in (p.hidden, p.weight, p.bias)]
    out = linear_logprob(p.hidden, p.weight, p.ids, p.temperature, bias=p.bias, chunk_bytes=chunk_bytes)
    loss = out.logp.sum() - 0.3 * out.entropy.sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for once, twice in zip(first, torch.autograd.grad(2 * loss, inputs), strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [None, 5 * 37 * 8])
def test_softcap_and_padded_vocabulary(chunk_bytes):
    p = head_problem()
    p.ids %= 30
    options = {"softcap": 3.0, "vocab_size": 30}
    d_logp, d_entropy = torch.randn(23).double(), torch.randn(23).double()
    out, grads = gradients(linear_logprob, p, d_logp, d_entropy, chunk_bytes=chunk_bytes, **options)
    truth, true_grads = gradients(linear_logprob_reference, p, d_logp, d_entropy, **options)
    for actual, expected in zip((*out, *grads), (*truth, *true_grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (grads[1][30:] == 0).all()
    assert (grads[2][30:] == 0).all()


def test_masked_rows_may_hold_anything_and_cost_nothing():
    p = head_problem()
    mask = torch.arange(23) % 3 != 0
    d_logp, d_entropy = torch.randn(23).double() * mask, torch.randn(23).double() * mask
    truth, true_grads = gradients(linear_logprob_reference, p, d_logp, d_entropy)
    p.hidden = torch.where(mask[:, None], p.hidden.detach(), torch.nan)
    p.temperature[~mask] = torch.nan
    p.ids[~mask] = -100
    with OperationRecorder() as seen:
        out, grads = gradients(linear_logprob, p, d_logp, d_entropy, mask=mask)
    for actual, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(actual, torch.where(mask, expected, 0))
    for actual, expected in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(actual, expected)
    assert seen.matrix_flops == 6 * int(mask.sum()) * p.hidden.shape[1] * len(p.weight)


def test_tied_weight_adds_both_uses():
    """The head is also the embedding: its gradient is the sum over both places."""
    p = head_problem()
    tokens = p.ids.flip(0)

    def gradient(function):
        weight = p.weight.clone().requires_grad_()
        function(weight[tokens].tanh(), weight, p.ids).logp.sum().backward()
        return weight.grad

    torch.testing.assert_close(gradient(linear_logprob), gradient(linear_logprob_reference))


def test_frozen_hidden():
    p = head_problem()
    weight = p.weight.requires_grad_()
    linear_logprob(p.hidden, weight, p.ids).logp.sum().backward()
    truth = p.weight.detach().clone().requires_grad_()
    linear_logprob_reference(p.hidden, truth, p.ids).logp.sum().backward()
    torch.testing.assert_close(weight.grad, truth.grad)


def test_rows_without_gradient_change_nothing():
    p = head_problem()
    d_logp = torch.randn(23).double()
    d_logp[::3] = 0
    d_logp[5:9] = 0
    _, grads = gradients(linear_logprob, p, d_logp, torch.zeros(23), chunk_bytes=4 * 37 * 8)
    _, truth = gradients(linear_logprob_reference, p, d_logp, torch.zeros(23))
    for actual, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (grads[0][::3] == 0).all()


def test_zero_rows():
    weight = torch.randn(5, 3, requires_grad=True)
    out = linear_logprob(torch.zeros(0, 3), weight, torch.zeros(0, dtype=torch.int64))
    out.logp.sum().backward()
    assert out.logp.shape == (0,)
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(dtype):
    num_rows, width, vocab = 512, 4, 992
    p = head_problem(num_rows, width, vocab)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (p.hidden, p.weight)]
    with OperationRecorder() as seen:
        linear_logprob(*inputs, p.ids, chunk_bytes=16 * vocab * 4).logp.sum().backward()
    assert seen.largest_numel <= 16 * vocab < num_rows * vocab


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, "hidden is 8 wide"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, "ids"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"temperature": -1.0}, "temperature"),
        ({"softcap": 0.0}, "softcap"),
        ({"vocab_size": 38}, "vocab_size"),
        ({"vocab_offset": 3}, "vocab_offset"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"ids": torch.full((23,), 37)}, "ids hold 37"),
        ({"backend": "triton"}, "cannot run"),
    ],
)
def test_bad_arguments_are_named(change, message):
    p = head_problem()
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": p.hidden, "weight": p.weight, "ids": p.ids, **change})
