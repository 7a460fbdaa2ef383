"""The operators with backend="triton" in the interpreter: equal to float64, also where the host may not look."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, logprob
from spear_kernels.linear_logprob import linear_logprob_reference, rows
from spear_kernels.linear_policy_loss import linear_policy_loss_reference
from spear_kernels.logprob import logprob_reference
from spear_kernels.policy_loss.config import AGGREGATIONS, KINDS
from spear_kernels.testing import (
    OperationRecorder,
    as_if_on_a_device,
    assert_close_to_truth,
    head_problem,
    head_with_logp,
    policy_config,
    policy_problem,
)

# More columns than one block of the row kernels has, odd in number; more rows than one tile of the products.
NUM_ROWS, WIDTH, VOCAB = 83, 40, 523
CHUNK_BYTES = 47 * VOCAB * 4

# Recording the lines that the interpreter runs doubles the time of a test. The tests of each kernel and the smaller
# ones below have the same lines recorded.
unrecorded = pytest.mark.no_cover


@pytest.fixture
def on_a_device():
    with as_if_on_a_device():
        yield


def rounded(problem, dtype):
    """The problem with hidden, weight and bias that `dtype` can hold."""
    for name in ("hidden", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    return problem


def leaves(problem, dtype):
    return [getattr(problem, name).to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def with_gradients(out, inputs):
    loss = (out.logp * torch.linspace(-1, 2, len(out.logp))).sum() + 0.3 * out.entropy.sum()
    return out.logp, out.entropy, *torch.autograd.grad(loss, inputs)


def assert_all_close_to_truth(actual, exact, plain):
    for own, true, naive in zip(actual, exact, plain, strict=True):
        assert_close_to_truth(own.detach(), true.detach(), naive.detach())


@unrecorded
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_logprob(dtype, inplace):
    p = head_problem(37, 16, VOCAB)
    logits = (p.hidden @ p.weight.T + p.bias).to(dtype).double()

    def run(function, dtype, **options):
        leaf = logits.to(dtype).requires_grad_()
        # A product with 1, so that the logits written over are not the leaf.
        out = function(leaf * 1, p.ids % 510, p.temperature, softcap=6.0, vocab_size=510, **options)
        return with_gradients(out, [leaf])

    actual = run(logprob, dtype, backend="triton", inplace_backward=inplace)
    assert_all_close_to_truth(actual, run(logprob_reference, torch.float64), run(logprob_reference, dtype))
    assert (actual[2][:, 510:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["fused", "chunked", "kept"])
def test_linear_logprob(dtype, path, monkeypatch):
    if path != "fused":
        monkeypatch.setattr(rows, "FUSED_MAX_WIDTH", 0)
        monkeypatch.setattr(rows, "FUSED_MAX_ROWS", 0)
    p = rounded(head_problem(NUM_ROWS, WIDTH, VOCAB), dtype)
    scaled = {"softcap": 6.0, "vocab_size": 510}
    chunk_bytes = None if path == "kept" else CHUNK_BYTES

    def run(function, dtype, **options):
        inputs = leaves(p, dtype)
        out = function(*inputs[:2], p.ids % 510, p.temperature, bias=inputs[2], **scaled, **options)
        return with_gradients(out, inputs)

    actual = run(linear_logprob, dtype, backend="triton", chunk_bytes=chunk_bytes)
    exact, plain = run(linear_logprob_reference, torch.float64), run(linear_logprob_reference, dtype)
    assert_all_close_to_truth(actual, exact, plain)


def policy_case(num_rows=NUM_ROWS, seed=0):
    p = policy_problem(num_rows, seed=seed)
    # Head problems take their vocabulary from the logits.
    p.logits, p.ids = torch.zeros(num_rows, VOCAB), torch.arange(num_rows) * 7 % VOCAB
    head = head_with_logp(p, WIDTH, seed)
    # A third of the sequences earned nothing.
    p.advantages[p.seq_ids % 3 == 0] = 0
    return p, rounded(head, torch.float32)


def policy_run(p, head, cfg, dtype, **options):
    inputs = leaves(head, dtype)
    result = linear_policy_loss(
        inputs[0],
        inputs[1],
        head.ids,
        p.old_logp,
        p.advantages,
        p.mask,
        cfg,
        p.seq_ids,
        head.temperature,
        **{
            "bias": inputs[2],
            "ref_logp": p.ref_logp if cfg.kl_coef else None,
            "positions": p.positions,
            "chunk_bytes": CHUNK_BYTES,
            "backend": "triton",
            **options,
        },
    )
    return result, (result.loss, *torch.autograd.grad(result.loss, inputs))


def policy_truth(p, head, cfg, dtype):
    inputs = leaves(head, dtype)
    selected = p.selection(cfg)
    loss = linear_policy_loss_reference(
        inputs[0],
        inputs[1],
        head.ids,
        p.old_logp.to(dtype),
        p.advantages.to(dtype),
        p.mask,
        cfg,
        p.seq_ids,
        head.temperature.to(dtype),
        inputs[2],
        p.ref_logp.to(dtype) if cfg.kl_coef else None,
        None,
        selected,
    )
    return loss, *torch.autograd.grad(loss, inputs)


# The surrogate alone leaves rows without a gradient; the other terms reach every row.
SURROGATE = {"entropy_coef": 0.0, "kl_coef": 0.0}


def configurations():
    return [policy_config(kind, **terms) for kind in KINDS for terms in ({}, SURROGATE)] + [
        policy_config("ppo", aggregation) for aggregation in AGGREGATIONS[1:]
    ]


def word(cfg):
    return f"{cfg.kind}-{cfg.aggregation}-{'all terms' if cfg.kl_coef else 'surrogate'}"


@unrecorded
@pytest.mark.parametrize("cfg", configurations(), ids=word)
def test_linear_policy_loss(cfg):
    p, head = policy_case()
    p.row_weight[:] = 1
    _, actual = policy_run(p, head, cfg, torch.float32)
    assert_all_close_to_truth(
        actual, policy_truth(p, head, cfg, torch.float64), policy_truth(p, head, cfg, torch.float32)
    )


@unrecorded
@pytest.mark.parametrize("cfg", configurations()[:12], ids=word)
def test_rows_are_counted_on_the_device_without_waiting(cfg, on_a_device):
    """Masked rows hold NaN: neither their logits nor their gradients may be read."""
    p, head = policy_case()
    p.row_weight[:] = 1
    exact, plain = policy_truth(p, head, cfg, torch.float64), policy_truth(p, head, cfg, torch.float32)
    head.hidden[~p.mask] = torch.nan
    head.temperature[~p.mask] = torch.nan
    head.ids[~p.mask] = -100
    for tensor in (p.old_logp, p.ref_logp, p.advantages):
        tensor[~p.mask] = torch.nan
    with OperationRecorder() as seen:
        result, actual = policy_run(p, head, cfg, torch.float32)
    assert not seen.host_syncs
    assert_all_close_to_truth(actual, exact, plain)
    assert (result.logp[~p.mask] == 0).all()
    assert (actual[1][~p.mask] == 0).all()


@pytest.fixture
def gradient_in_bfloat16(monkeypatch):
    """Logits in float32 whose gradient has a matrix of its own in bfloat16, as bfloat16 heads have on CUDA."""
    both_half = lambda x, weight: x.dtype == weight.dtype == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(sys.modules["spear_kernels.linear_logprob.head"], "multiplies_into_float32", both_half)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("chunk_bytes", [None, CHUNK_BYTES, 9 * VOCAB * 4])
def test_linear_logprob_with_a_gradient_matrix_of_its_own(backend, chunk_bytes, gradient_in_bfloat16, monkeypatch):
    monkeypatch.setattr(rows, "FUSED_MAX_WIDTH", 0)
    monkeypatch.setattr(rows, "FUSED_MAX_ROWS", 0)
    p = rounded(head_problem(NUM_ROWS, WIDTH, VOCAB), torch.bfloat16)

    def run(function, dtype, **options):
        inputs = leaves(p, dtype)
        return with_gradients(function(*inputs[:2], p.ids, p.temperature, bias=inputs[2], **options), inputs)

    actual = run(linear_logprob, torch.bfloat16, backend=backend, chunk_bytes=chunk_bytes)
    exact, plain = run(linear_logprob_reference, torch.float64), run(linear_logprob_reference, torch.bfloat16)
    assert_all_close_to_truth(actual, exact, plain)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("plan_on_host", [None, True, False])
def test_linear_policy_loss_with_a_gradient_matrix_of_its_own(backend, plan_on_host, gradient_in_bfloat16):
    p, head = policy_case()
    p.row_weight[:] = 1
    head, cfg = rounded(head, torch.bfloat16), policy_config("ppo", **SURROGATE)
    exact, plain = policy_truth(p, head, cfg, torch.float64), policy_truth(p, head, cfg, torch.bfloat16)
    device = nullcontext() if plan_on_host is None else as_if_on_a_device(plan_on_host)
    with device:
        _, actual = policy_run(p, head, cfg, torch.bfloat16, backend=backend)
    assert_all_close_to_truth(actual, exact, plain)


def test_log_probs_of_masked_rows_are_zero_also_without_gradients(on_a_device):
    p, head = policy_case()
    head.hidden[~p.mask] = torch.nan
    hidden, weight = head.hidden.float(), head.weight.float()
    with torch.no_grad():
        result = linear_policy_loss(
            hidden,
            weight,
            head.ids,
            p.old_logp,
            p.advantages,
            p.mask,
            PolicyLossConfig(),
            chunk_bytes=CHUNK_BYTES,
            backend="triton",
        )
    assert result.loss.isfinite()
    assert (result.logp[~p.mask] == 0).all()
    assert (result.entropy[~p.mask] == 0).all()


def test_products_on_the_device_stop_at_the_counts(on_a_device, monkeypatch):
    """Rows that the kernels were told of: action rows forward, rows with a gradient backward."""
    launches = sys.modules["spear_kernels.linear_logprob.launch"]
    counts = {"live_rows_product": 0, "live_rows_outer": 0}
    for name in counts:
        original = getattr(launches, name)

        def counting(first, second, order, count, *rest, name=name, original=original, **options):
            counts[name] += int(count)
            return original(first, second, order, count, *rest, **options)

        monkeypatch.setattr(launches, name, counting)
    p, head = policy_case()
    policy_run(p, head, PolicyLossConfig("reinforce"), torch.float32)
    live = int((p.mask & (p.advantages != 0)).sum())
    assert counts == {"live_rows_product": int(p.mask.sum()) + live, "live_rows_outer": live}


@pytest.mark.parametrize("active", [0, 1])
def test_hardly_any_rows_on_a_device(active, on_a_device):
    p, head = policy_case()
    p.mask[:] = torch.arange(NUM_ROWS) < active
    p.advantages[:] = 1
    result, (loss, d_hidden, d_weight, _) = policy_run(p, head, PolicyLossConfig("reinforce"), torch.float32)
    assert loss.isfinite()
    assert int((d_hidden != 0).any(1).sum()) == active
    assert bool((d_weight != 0).any()) == bool(active)
    assert result.metrics["num_tokens"].item() == active


def test_float64_and_unknown_types_are_refused():
    p = head_problem()
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(p.hidden, p.weight, p.ids, backend="triton")
