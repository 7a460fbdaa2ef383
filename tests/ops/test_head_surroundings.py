"""The head operators under autocast, loss scaling, checkpointing and whatever else training loops do around them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, logprob
from spear_kernels.linear_logprob import linear_logprob_reference
from spear_kernels.logprob import logprob_reference
from spear_kernels.testing import OperationRecorder, head_problem

NUM_ROWS, WIDTH, VOCAB = 23, 8, 37
REINFORCE = PolicyLossConfig("reinforce")


def leaves(problem, dtype=torch.float32):
    return [getattr(problem, name).to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def policy_loss_of(inputs, ids, num_tokens=None, **options):
    hidden, weight, bias = inputs
    ones = torch.ones(len(ids))
    return linear_policy_loss(
        hidden, weight, ids, -ones, ones, None, REINFORCE, bias=bias, num_tokens=num_tokens, **options
    ).loss


def logprob_loss_of(inputs, ids, num_tokens=None, **options):
    hidden, weight, bias = inputs
    return -linear_logprob(hidden, weight, ids, bias=bias, **options).logp.sum() / (num_tokens or len(ids))


BOTH = pytest.mark.parametrize("loss_of", [policy_loss_of, logprob_loss_of])


@BOTH
def test_float16_gradients_wait_for_the_loss_scale(loss_of):
    """Of a mean over 300000 tokens nothing would be left in float16 before a gradient scaler multiplies it."""
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    inputs, truth = leaves(p, torch.float16), leaves(p, torch.float64)
    (loss_of(inputs, p.ids, 3e5) * 65536).backward()
    (loss_of(truth, p.ids, 3e5) * 65536).backward()
    for own, exact in zip(inputs, truth, strict=True):
        error = (own.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 2e-3


@BOTH
def test_autocast_rounds_the_inputs_as_a_linear_layer_does_and_nothing_else(loss_of):
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    inputs, rounded = leaves(p), leaves(p, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(inputs, p.ids)
    loss.backward()
    expected = loss_of(rounded, p.ids)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for own, other in zip(inputs, rounded, strict=True):
        torch.testing.assert_close(own.grad, other.grad.float(), rtol=0, atol=0)


def test_autocast_leaves_logits_and_their_entropy_alone():
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    logits = (p.hidden @ p.weight.T).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logprob(logits, p.ids)
    for own, exact in zip(out, logprob_reference(logits.double(), p.ids), strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-6, atol=1e-6)


@BOTH
def test_second_derivatives_are_refused(loss_of):
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    inputs = leaves(p)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss_of(inputs, p.ids), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        logits = torch.randn(3, 5, requires_grad=True)
        torch.autograd.grad(logprob(logits, torch.zeros(3).long()).logp.sum(), logits, create_graph=True)


@BOTH
def test_checkpointing_changes_no_gradient(loss_of):
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    plain, kept = leaves(p), leaves(p)
    loss_of(plain, p.ids).backward()
    checkpoint(lambda *inputs: loss_of(inputs, p.ids), *kept, use_reentrant=False).backward()
    for own, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_the_one_shot_under_checkpointing_stays_one_sweep():
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    inputs = leaves(p)
    with OperationRecorder() as seen:
        checkpoint(lambda *given: policy_loss_of(given, p.ids), *inputs, use_reentrant=False).backward()
    assert seen.matrix_flops == 6 * NUM_ROWS * WIDTH * VOCAB


def test_nothing_is_made_of_the_logits_when_no_gradient_is_wanted():
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    with torch.no_grad(), OperationRecorder() as seen:
        policy_loss_of(leaves(p), p.ids)
    assert "scatter_add_" not in seen.names


def test_hidden_states_of_rows_that_enter_are_gathered_chunk_by_chunk():
    num_rows, width, vocab = 600, 64, 32
    p = head_problem(num_rows, width, vocab)
    mask = torch.arange(num_rows) % 5 > 0
    inputs = leaves(p)[:2]
    with OperationRecorder() as seen:
        out = linear_logprob(*inputs, p.ids, mask=mask, chunk_bytes=20 * vocab * 4)
    assert seen.largest_numel < num_rows * width / 4
    out.logp.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_without_any_finite_logit(backend):
    logits = torch.randn(3, 40)
    logits[1] = -torch.inf
    leaf = logits.clone().requires_grad_()
    out = logprob(leaf, torch.tensor([1, 2, 3]), backend=backend)
    (out.logp[[0, 2]].sum() + out.entropy.sum()).backward()
    assert out.logp[1] == -torch.inf
    assert out.entropy[1] == 0
    assert (leaf.grad[1] == 0).all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_broken_row_that_the_loss_leaves_out_breaks_no_gradient(backend):
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    hidden, weight, _ = leaves(p)
    broken = torch.where(torch.arange(NUM_ROWS)[:, None] == 4, torch.nan, hidden)
    out = linear_logprob(broken, weight, p.ids, backend=backend)
    (out.logp[:4].sum() + out.logp[5:].sum()).backward()
    assert weight.grad.isfinite().all()
    exact = p.weight.clone().requires_grad_()
    keep = torch.arange(NUM_ROWS) != 4
    linear_logprob_reference(p.hidden[keep], exact, p.ids[keep]).logp.sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(NUM_ROWS)}, "ids are torch.float32"),
        ({"ids": torch.zeros(NUM_ROWS, dtype=torch.bool)}, "ids are torch.bool"),
        ({"softcap": float("inf")}, "softcap=inf"),
        ({"temperature": torch.zeros(NUM_ROWS)}, "temperature holds 0"),
        ({"temperature": torch.ones(NUM_ROWS, requires_grad=True)}, "requires a gradient"),
        ({"vocab_size": 20.0}, "vocab_size=20.0"),
        ({"chunk_bytes": 2.5e6}, "chunk_bytes=2500000.0"),
    ],
)
def test_bad_arguments_are_named_before_any_work(change, message):
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": p.hidden, "weight": p.weight, "ids": p.ids, **change})


def test_integer_ids_of_any_width():
    p = head_problem(NUM_ROWS, WIDTH, VOCAB)
    wide, narrow = (linear_logprob(p.hidden, p.weight, ids).logp for ids in (p.ids, p.ids.int()))
    assert torch.equal(wide, narrow)
