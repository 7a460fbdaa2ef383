"""linear_policy_loss: one sweep gives the loss and gradients of the two-step path and of the full-logits definition."""

from __future__ import annotations

import pytest
import torch

from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, policy_loss
from spear_kernels.linear_policy_loss import linear_policy_loss_reference
from spear_kernels.policy_loss.config import AGGREGATIONS, KINDS
from spear_kernels.testing import (
    OperationRecorder,
    as_if_on_a_device,
    assert_close_to_truth,
    head_with_logp,
    policy_config,
    policy_problem,
)

NUM_ROWS, WIDTH, VOCAB = 40, 6, 11


def problem(seed=0, num_rows=NUM_ROWS):
    p = policy_problem(num_rows, seed=seed)
    return p, head_with_logp(p, WIDTH, seed)


def run(p, head, cfg, inputs, **options):
    hidden, weight, bias = inputs
    return linear_policy_loss(
        hidden,
        weight,
        head.ids,
        p.old_logp,
        p.advantages,
        options.pop("mask", p.mask),
        cfg,
        p.seq_ids,
        head.temperature,
        **{
            "bias": bias,
            "ref_logp": p.ref_logp,
            "row_weight": p.row_weight,
            "positions": p.positions,
            "chunk_bytes": 7 * VOCAB * 8,
            **options,
        },
    )


def leaves(head, dtype=torch.float64):
    return [tensor.detach().to(dtype).clone().requires_grad_() for tensor in (head.hidden, head.weight, head.bias)]


def truth(p, head, cfg, inputs):
    hidden, weight, bias = inputs
    return linear_policy_loss_reference(
        hidden,
        weight,
        head.ids,
        p.old_logp,
        p.advantages,
        p.mask,
        cfg,
        p.seq_ids,
        head.temperature,
        bias,
        p.ref_logp,
        p.row_weight,
        p.selection(cfg),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
def test_loss_and_gradients_equal_the_definition(kind, aggregation, entropy_coef):
    cfg = policy_config(kind, aggregation, entropy_coef=entropy_coef)
    p, head = problem()
    inputs, true_inputs = leaves(head), leaves(head)
    result, expected = run(p, head, cfg, inputs), truth(p, head, cfg, true_inputs)
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)
    result.loss.backward()
    expected.backward()
    for actual, exact in zip(inputs, true_inputs, strict=True):
        torch.testing.assert_close(actual.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("ppo", {"entropy_coef": 0.03, "kl_coef": 0.0}),
        ("ppo", {"entropy_coef": 0.0, "kl_coef": 0.2}),
        ("kl_cov", {"entropy_coef": 0.0, "kl_coef": 0.0, "cov_ratio": 1.0}),
        ("ppo", {"entropy_coef": 0.0, "kl_coef": 0.0}),
    ],
)
def test_rows_of_zero_advantage_keep_the_gradient_of_other_terms(kind, terms):
    cfg = policy_config(kind, **terms)
    p, head = problem()
    p.advantages[p.seq_ids % 3 == 0] = 0
    inputs, true_inputs = leaves(head), leaves(head)
    run(p, head, cfg, inputs).loss.backward()
    truth(p, head, cfg, true_inputs).backward()
    for actual, exact in zip(inputs, true_inputs, strict=True):
        torch.testing.assert_close(actual.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ppo", "clip_cov"])
def test_rows_that_turn_out_idle_in_any_chunk(kind):
    """All rows enter in order, and clipped or dropped ones leave their chunk before the backward products."""
    cfg = policy_config(kind, entropy_coef=0.0, kl_coef=0.0)
    p, head = problem()
    p.mask[:] = True
    inputs, true_inputs = leaves(head), leaves(head)
    with OperationRecorder() as seen:
        result = run(p, head, cfg, inputs, mask=None, selected=p.selection(cfg))
    expected = truth(p, head, cfg, true_inputs)
    result.loss.backward()
    expected.backward()
    for actual, exact in zip(inputs, true_inputs, strict=True):
        torch.testing.assert_close(actual.grad, exact.grad, rtol=1e-10, atol=1e-12)
    assert seen.matrix_flops < 6 * NUM_ROWS * WIDTH * VOCAB


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_two_step_path(kind):
    cfg = policy_config(kind)
    p, head = problem(1)
    result = run(p, head, cfg, leaves(head))
    out = linear_logprob(head.hidden, head.weight, head.ids, head.temperature, bias=head.bias)
    arguments = (p.old_logp, p.advantages, p.mask, cfg, p.seq_ids)
    two_step = policy_loss(out.logp, *arguments, out.entropy, p.ref_logp, p.row_weight, positions=p.positions)
    torch.testing.assert_close(result.loss, two_step.loss)
    assert set(result.metrics) == set(two_step.metrics)
    for name, value in result.metrics.items():
        torch.testing.assert_close(value, two_step.metrics[name], msg=name)
    torch.testing.assert_close(result.logp, torch.where(p.mask, out.logp, 0))
    torch.testing.assert_close(result.entropy, torch.where(p.mask, out.entropy, 0))
    assert not result.logp.requires_grad


@pytest.mark.parametrize("kind", ["ppo", "clip_cov", "kl_cov", "reinforce"])
def test_gradcheck(kind):
    cfg = policy_config(kind)
    p, head = problem(2, num_rows=6)
    selected = p.selection(cfg)

    def function(hidden, weight, bias):
        return run(p, head, cfg, (hidden, weight, bias), selected=selected).loss

    # A repeated backward computes the gradients again, with other roundings.
    assert torch.autograd.gradcheck(function, tuple(leaves(head)), nondet_tol=1e-12)


@pytest.mark.parametrize("kind", ["ppo", "clip_cov", "gspo"])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_chunks_do_not_change_the_result(kind, rows_per_chunk):
    p, head = problem()
    inputs, whole_inputs = leaves(head), leaves(head)
    run(p, head, policy_config(kind), inputs, chunk_bytes=rows_per_chunk * VOCAB * 8).loss.backward()
    run(p, head, policy_config(kind), whole_inputs, chunk_bytes=1 << 20).loss.backward()
    for part, whole in zip(inputs, whole_inputs, strict=True):
        torch.testing.assert_close(part.grad, whole.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind):
    """Clip-Cov split-invariance included: the choice is made once, over all rows."""
    cfg = policy_config(kind, "seq-mean-token-sum-norm")
    p, head = problem(3, num_rows=60)
    whole_inputs, inputs = leaves(head), leaves(head)
    whole = run(p, head, cfg, whole_inputs)
    whole.loss.backward()
    selected = p.selection(cfg)
    total = torch.zeros((), dtype=torch.float64)
    for part in range(3):
        rows = ((p.seq_ids // 1000) % 3 == part).nonzero()[:, 0]
        result = linear_policy_loss(
            inputs[0][rows],
            inputs[1],
            head.ids[rows],
            p.old_logp[rows],
            p.advantages[rows],
            p.mask[rows],
            cfg,
            p.seq_ids[rows],
            head.temperature[rows],
            bias=inputs[2],
            ref_logp=p.ref_logp[rows],
            row_weight=p.row_weight[rows],
            selected=None if selected is None else selected[rows],
            num_tokens=int(p.mask.sum()),
            num_seqs=torch.tensor(len(p.seq_ids[p.mask].unique())),
        )
        result.loss.backward()
        total += result.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach())
    for part, exact in zip(inputs, whole_inputs, strict=True):
        torch.testing.assert_close(part.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_never_enter(kind):
    p, head = problem()
    clean = leaves(head)
    expected = run(p, head, policy_config(kind), clean)
    expected.loss.backward()
    head.hidden[~p.mask] = torch.nan
    head.ids[~p.mask] = -100
    for tensor in (p.old_logp, p.ref_logp, p.advantages, p.row_weight, head.temperature):
        tensor[~p.mask] = torch.nan
    dirty = leaves(head)
    result = run(p, head, policy_config(kind), dirty)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    for actual, exact in zip(dirty, clean, strict=True):
        torch.testing.assert_close(actual.grad, exact.grad)
    assert (dirty[0].grad[~p.mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan_on_host", [False, True])
def test_path_for_devices_never_waits_and_gives_the_same(kind, plan_on_host):
    """Where counting rows on the host would wait, masked rows pass through as zeros, NaN or not."""
    p, head = problem()
    expected_inputs = leaves(head)
    expected = run(p, head, policy_config(kind), expected_inputs)
    expected.loss.backward()
    head.hidden[~p.mask] = torch.nan
    head.temperature[~p.mask] = torch.nan
    head.ids[~p.mask] = -100
    inputs = leaves(head)
    with as_if_on_a_device(plan_on_host), OperationRecorder() as seen:
        result = run(p, head, policy_config(kind), inputs)
        result.loss.backward()
    # The plan itself counts masks that lie on the host.
    assert seen.host_syncs <= ({"nonzero", "_local_scalar_dense"} if plan_on_host else set())
    for name, value in expected.metrics.items():
        torch.testing.assert_close(result.metrics[name], value, msg=name)
    torch.testing.assert_close(result.logp, expected.logp)
    torch.testing.assert_close(result.entropy, expected.entropy)
    for actual, exact in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(actual.grad, exact.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [0, 5])
def test_zero_active_rows(kind, num_rows):
    p, head = problem(num_rows=num_rows)
    p.mask[:] = False
    inputs = leaves(head)
    result = run(p, head, policy_config(kind), inputs)
    result.loss.backward()
    assert result.loss.item() == 0
    assert all(value.item() == 0 for value in result.metrics.values())
    assert result.logp.shape == (num_rows,)
    assert all((tensor.grad == 0).all() for tensor in inputs)


def test_zero_advantage_rows_skip_the_backward_products():
    """Counted in floating-point operations: with a share of live rows g the cost is (2 + 4 g) NVH."""
    p, head = problem(num_rows=64)
    p.mask[:] = True
    cfg = PolicyLossConfig(kind="reinforce")

    def flops(num_live):
        p.advantages[:] = (torch.arange(64) < num_live).double()
        with OperationRecorder() as seen:
            run(p, head, cfg, leaves(head), chunk_bytes=8 * VOCAB * 8)
        return seen.matrix_flops / (64 * VOCAB * WIDTH)

    assert flops(64) == 6
    assert flops(16) == 3
    assert flops(20) == pytest.approx(2 + 4 * 20 / 64)
    assert flops(0) == 2


def test_no_gradient_work_without_grad():
    p, head = problem()
    p.mask[:] = True
    inputs = leaves(head)
    with torch.no_grad(), OperationRecorder() as seen:
        result = run(p, head, PolicyLossConfig(), inputs)
    assert seen.matrix_flops == 2 * NUM_ROWS * VOCAB * WIDTH
    assert not result.loss.requires_grad
    assert not run(p, head, PolicyLossConfig(), [tensor.detach() for tensor in inputs]).loss.requires_grad


def test_frozen_weight_gets_no_gradient_and_no_product():
    p, head = problem()
    p.mask[:] = True
    p.row_weight[:] = 1
    hidden, _, bias = leaves(head)
    with OperationRecorder() as seen:
        result = run(p, head, PolicyLossConfig(kind="reinforce"), (hidden, head.weight, bias))
    assert seen.matrix_flops == 4 * NUM_ROWS * VOCAB * WIDTH
    result.loss.backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_tied_weight_adds_both_uses(kind):
    p, head = problem()
    tokens = head.ids.flip(0)

    def gradient(function):
        weight = head.weight.clone().requires_grad_()
        function(p, head, policy_config(kind), (weight[tokens].tanh(), weight, head.bias)).backward()
        return weight.grad

    ours = gradient(lambda *arguments: run(*arguments).loss)
    torch.testing.assert_close(ours, gradient(truth))


def test_precision_against_float64():
    cfg = policy_config()
    p, head = problem()
    for name in ("hidden", "weight", "bias"):
        setattr(head, name, getattr(head, name).bfloat16().double())
    inputs, naive_inputs, true_inputs = leaves(head, torch.bfloat16), leaves(head, torch.bfloat16), leaves(head)
    result = run(p, head, cfg, inputs)
    naive, exact = truth(p, head, cfg, naive_inputs), truth(p, head, cfg, true_inputs)
    assert result.loss.dtype == result.logp.dtype == torch.float32
    assert_close_to_truth(result.loss.detach(), exact.detach(), naive.detach())
    for loss in (result.loss, naive, exact):
        loss.backward()
    for actual, plain, right in zip(inputs, naive_inputs, true_inputs, strict=True):
        assert actual.grad.dtype == torch.bfloat16
        assert_close_to_truth(actual.grad, right.grad, plain.grad)


def test_bf16_weight_gradient_is_accumulated_in_float32():
    num_rows = 768
    hidden = torch.ones(num_rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(num_rows, dtype=torch.int64)
    ones = torch.ones(num_rows)
    cfg = PolicyLossConfig(kind="reinforce")
    linear_policy_loss(hidden, weight, ids, ones, -ones, ones.bool(), cfg, num_tokens=1, chunk_bytes=8).loss.backward()
    assert weight.grad.flatten().tolist() == [num_rows / 2, -num_rows / 2]


@pytest.mark.parametrize("grad_output", [-3.0, 0.0])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_output_gradient_scales_and_backward_repeats(kind, grad_output):
    p, head = problem()
    inputs = leaves(head)
    loss = run(p, head, policy_config(kind), inputs).loss
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(loss * grad_output, inputs)
    for first, second in zip(plain, scaled, strict=True):
        torch.testing.assert_close(second, first * grad_output)


@pytest.mark.parametrize("kind", ["ppo", "clip_cov", "gspo"])
def test_never_holds_all_logits(kind):
    num_rows, width, vocab = 400, 3, 896
    p = policy_problem(num_rows)
    hidden = torch.randn(num_rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    tokens = (p.ids, p.old_logp, p.advantages, p.mask, PolicyLossConfig(kind=kind), p.seq_ids)
    with OperationRecorder() as seen:
        linear_policy_loss(hidden, weight, *tokens, chunk_bytes=10 * vocab * 4).loss.backward()
    assert seen.largest_numel <= 10 * vocab < num_rows * vocab


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"backend": "triton"}, "cannot run"),
        ({"selected": torch.zeros(NUM_ROWS, dtype=torch.bool)}, "selected"),
        ({"row_weight": torch.zeros(3)}, "row_weight"),
        ({"ref_logp": None}, "ref_logp"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_bad_arguments_are_named(change, message):
    p, head = problem()
    with pytest.raises(ValueError, match=message):
        run(p, head, policy_config(), leaves(head), **change)
