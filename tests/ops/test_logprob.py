"""logprob: log-probability and entropy from logits, against float64 loops and the shipped-bug list."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_kernels import logprob
from spear_kernels.logprob import logprob_reference, rows
from spear_kernels.testing import OperationRecorder, assert_close_to_truth


def slow_logprob(row: list[float], token: int, temperature: float) -> tuple[float, float]:
    """One row in Python floats."""
    scaled = [value / temperature for value in row]
    peak = max(scaled)
    total = math.fsum(math.exp(value - peak) for value in scaled)
    entropy = 0.0
    for value in scaled:
        p = math.exp(value - peak) / total
        if p > 0:
            entropy -= p * (value - peak - math.log(total))
    return scaled[token] - peak - math.log(total), entropy


def random_case(num_rows, vocab, seed=0, scale=3.0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=random, dtype=torch.float64) * scale
    return logits, torch.randint(vocab, (num_rows,), generator=random)


def gradients(function, logits, ids, temperature=1.0, d_logp=1.0, d_entropy=1.0):
    logits = logits.detach().clone().requires_grad_()
    out = function(logits, ids, temperature)
    return torch.autograd.grad((d_logp * out.logp + d_entropy * out.entropy).sum(), logits)[0]


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.floats(0.2, 4.0))
def test_matches_the_slow_definition(seed, num_rows, vocab, temperature):
    logits, ids = random_case(num_rows, vocab, seed)
    out = logprob(logits, ids, temperature)
    for n in range(num_rows):
        logp, entropy = slow_logprob(logits[n].tolist(), int(ids[n]), temperature)
        assert out.logp[n].item() == pytest.approx(logp, abs=1e-12)
        assert out.entropy[n].item() == pytest.approx(entropy, abs=1e-12)


def test_reference_matches_the_slow_definition():
    logits, ids = random_case(5, 13)
    out = logprob_reference(logits, ids, 0.7)
    for n in range(5):
        logp, entropy = slow_logprob(logits[n].tolist(), int(ids[n]), 0.7)
        assert out.logp[n].item() == pytest.approx(logp, abs=1e-12)
        assert out.entropy[n].item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor([0.5, 1.0, 2.0, 1.5])])
def test_gradcheck(temperature):
    logits, ids = random_case(4, 7)
    assert torch.autograd.gradcheck(lambda z: logprob(z, ids, temperature), logits.requires_grad_())


# V is odd and larger than one tile of rows holds, so tiles end inside the batch.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 1009), (3, 50257), (7, 1)])
def test_precision_against_float64(dtype, shape):
    logits, ids = random_case(*shape)
    logits = logits.to(dtype)
    truth = logprob_reference(logits.double(), ids, 0.8)
    naive = logprob_reference(logits.float(), ids, 0.8)
    out = logprob(logits, ids, 0.8)
    for actual, exact, plain in zip(out, truth, naive, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_truth(actual, exact, plain)
    exact = gradients(logprob_reference, logits.double(), ids, 0.8)
    plain = gradients(logprob_reference, logits, ids, 0.8)
    assert_close_to_truth(gradients(logprob, logits, ids, 0.8), exact, plain)


def test_tile_size_does_not_change_the_result(monkeypatch):
    logits, ids = random_case(50, 33)
    whole, whole_grad = logprob(logits, ids), gradients(logprob, logits, ids)
    monkeypatch.setattr(rows, "CPU_TILE_BYTES", 3 * 33 * 8)
    tiled = logprob(logits, ids)
    assert torch.equal(whole.logp, tiled.logp)
    assert torch.equal(whole.entropy, tiled.entropy)
    assert torch.equal(whole_grad, gradients(logprob, logits, ids))


def test_temperature_per_token_equals_row_by_row():
    logits, ids = random_case(6, 9)
    temperature = torch.linspace(0.3, 2.0, 6, dtype=torch.float64)
    out = logprob(logits, ids, temperature)
    for n in range(6):
        alone = logprob(logits[n : n + 1], ids[n : n + 1], temperature[n].item())
        torch.testing.assert_close(out.logp[n : n + 1], alone.logp)


def test_normaliser_is_exact():
    """torch's softmax in float32 is off by some 5e-6 here, which would be an error of every log-prob of a row."""
    logits, _ = random_case(64, 32000, scale=4.0)
    logits = logits.float()
    ids = logits.argmax(1)
    error = logprob(logits, ids).logp - logprob_reference(logits.double(), ids).logp
    assert error.abs().max() < 1.5e-6


def test_all_logits_hugely_negative():
    logits, ids = random_case(4, 9)
    shifted = (logits.float() - 3e4).requires_grad_()
    out = logprob(shifted, ids)
    truth = logprob_reference(shifted.detach().double(), ids)
    assert_close_to_truth(out.logp, truth.logp, logprob_reference(shifted.detach(), ids).logp)
    out.entropy.sum().backward()
    assert torch.isfinite(shifted.grad).all()


def test_big_logits_keep_probabilities_exact():
    """At 1e4 a float32 logsumexp is 5e-4 off, which must not reach the gradient."""
    logits = torch.tensor([[1e4, 1e4 + 1.0, 1e4 - 2.0]])
    grad = gradients(logprob, logits, torch.tensor([0]), d_entropy=0.0)
    truth = gradients(logprob_reference, logits.double(), torch.tensor([0]), d_entropy=0.0)
    assert (grad.double() - truth).abs().max() < 1e-6


def test_minus_infinity_logits():
    logits, ids = random_case(5, 12)
    logits[:, 3:7] = -torch.inf
    ids[:] = torch.tensor([0, 1, 2, 8, 9])
    keep = [0, 1, 2, *range(7, 12)]
    out = logprob(logits, ids)
    packed_ids = torch.tensor([0, 1, 2, 4, 5])
    truth = logprob_reference(logits[:, keep], packed_ids)
    torch.testing.assert_close(out.logp, truth.logp)
    torch.testing.assert_close(out.entropy, truth.entropy)
    grad = gradients(logprob, logits, ids)
    assert (grad[:, 3:7] == 0).all()
    torch.testing.assert_close(grad[:, keep], gradients(logprob_reference, logits[:, keep], packed_ids))


def test_impossible_token_has_logp_minus_infinity():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert logprob(logits, torch.tensor([1])).logp.item() == -math.inf


def test_probability_near_one():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 60.0
    out = logprob(logits, torch.tensor([2]))
    assert out.logp.item() == pytest.approx(0.0, abs=1e-7)
    assert out.entropy.item() == pytest.approx(0.0, abs=1e-7)
    assert gradients(logprob, logits, torch.tensor([2])).abs().max() < 1e-6


def test_zero_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    out = logprob(logits, torch.zeros(0, dtype=torch.int64))
    assert out.logp.shape == out.entropy.shape == (0,)
    out.logp.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_entropy_gradient_is_not_dropped():
    logits, ids = random_case(6, 15)
    grad = gradients(logprob, logits, ids, d_logp=0.0)
    assert grad.abs().max() > 0.01
    torch.testing.assert_close(grad, gradients(logprob_reference, logits, ids, d_logp=0.0))


def test_output_gradients_scale_each_row():
    logits, ids = random_case(6, 15)
    scale = torch.linspace(-2, 3, 6, dtype=torch.float64)
    grad = gradients(logprob, logits, ids, d_logp=scale, d_entropy=scale.flip(0))
    truth = gradients(logprob_reference, logits, ids, d_logp=scale, d_entropy=scale.flip(0))
    torch.testing.assert_close(grad, truth)


def test_backward_leaves_the_logits_alone():
    logits, ids = random_case(6, 15)
    before = logits.clone()
    gradients(logprob, logits, ids)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2.0, 6, dtype=torch.float64)])
def test_softcap_and_padded_vocabulary(temperature):
    logits, ids = random_case(6, 15)
    ids %= 11
    logits[:, 11:] = 1e4

    def capped(z, ids, temperature):
        return logprob(z, ids, temperature, softcap=2.5, vocab_size=11)

    def truth(z, ids, temperature):
        return logprob_reference(z, ids, temperature, 2.5, 11)

    for actual, exact in zip(capped(logits, ids, temperature), truth(logits, ids, temperature), strict=True):
        torch.testing.assert_close(actual, exact)
    grad = gradients(capped, logits, ids, temperature)
    torch.testing.assert_close(grad, gradients(truth, logits, ids, temperature))
    assert (grad[:, 11:] == 0).all()


def test_gradient_over_the_logits_in_place():
    logits, ids = random_case(6, 15)
    truth = gradients(logprob_reference, logits, ids)
    own = logits.clone().requires_grad_()
    z = own * 1.0
    out = logprob(z, ids, inplace_backward=True)
    (out.logp + out.entropy).sum().backward(retain_graph=True)
    torch.testing.assert_close(own.grad, truth)
    assert not torch.equal(z, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logp.sum().backward()


def test_rows_that_share_memory_are_not_written_over():
    logits, ids = random_case(1, 15)
    own = logits.clone().requires_grad_()
    logprob((own * 1).expand(4, 15), ids.expand(4), inplace_backward=True).logp.sum().backward()
    torch.testing.assert_close(own.grad, 4 * gradients(logprob_reference, logits, ids, d_entropy=0.0))


def test_half_precision_logits_are_widened_in_tiles():
    logits, ids = random_case(600, 4001)
    logits = logits.bfloat16()
    with OperationRecorder() as seen:
        logprob(logits, ids)
    assert seen.largest_numel < logits.numel() / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids"),
        ({"ids": torch.full((4,), -100)}, "ids hold -100"),
        ({"softcap": -1.0}, "softcap"),
        ({"vocab_size": 6}, "vocab_size"),
        ({"logits": torch.zeros(2, 3, 4)}, "logits"),
        ({"backend": "triton"}, "cannot run"),
        ({"backend": "cuda"}, "unknown"),
    ],
)
def test_bad_arguments_are_named(change, message):
    logits, ids = random_case(4, 5)
    with pytest.raises(ValueError, match=message):
        logprob(**{"logits": logits, "ids": ids, **change})
