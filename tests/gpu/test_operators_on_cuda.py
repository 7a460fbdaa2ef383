"""The operators on a CUDA device at real sizes, against float64; what no interpreter can show."""

from __future__ import annotations

import pytest
import torch

from spear_kernels import PolicyLossConfig, covariance_select, linear_logprob, linear_policy_loss, logprob, policy_loss
from spear_kernels.linear_logprob import linear_logprob_reference, rows
from spear_kernels.linear_policy_loss import linear_policy_loss_reference
from spear_kernels.logprob import logprob_reference
from spear_kernels.policy_loss.config import KINDS
from spear_kernels.testing import assert_close_to_truth, policy_config, policy_problem

DTYPES = [torch.float32, torch.bfloat16]


def with_gradients(out, inputs):
    loss = (out.logp * torch.linspace(-1, 2, len(out.logp), device=out.logp.device)).sum() + 0.3 * out.entropy.sum()
    return out.logp, out.entropy, *torch.autograd.grad(loss, inputs)


def assert_all_close_to_truth(actual, exact, plain):
    for own, true, naive in zip(actual, exact, plain, strict=True):
        assert_close_to_truth(own.detach(), true.detach(), naive.detach())


def head(machine, dtype, num_rows=None):
    """hidden, weight and ids with logits of standard deviation 2, in values that `dtype` holds, as float64."""
    num_rows = num_rows or machine.num_rows
    hidden = machine.normal(num_rows, machine.width).to(dtype)
    weight = (machine.normal(machine.vocab, machine.width, seed=1) * (2 / machine.width**0.5)).to(dtype)
    return hidden.double(), weight.double(), machine.ids(num_rows, machine.vocab)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_logprob(machine, dtype, inplace):
    logits = (machine.normal(machine.num_rows, machine.vocab) * 3).to(dtype).double()
    ids = machine.ids(machine.num_rows, machine.vocab - 11)
    temperature = torch.linspace(0.6, 1.4, machine.num_rows, device=machine.device)

    def run(function, dtype, **options):
        leaf = logits.to(dtype).requires_grad_()
        out = function(leaf * 1, ids, temperature, softcap=9.0, vocab_size=machine.vocab - 11, **options)
        return with_gradients(out, [leaf])

    actual = run(logprob, dtype, backend="triton", inplace_backward=inplace)
    assert_all_close_to_truth(actual, run(logprob_reference, torch.float64), run(logprob_reference, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["fused", "chunked", "kept"])
def test_linear_logprob(machine, dtype, path, monkeypatch):
    monkeypatch.setattr(rows, "FUSED_MAX_WIDTH", machine.width if path == "fused" else 0)
    monkeypatch.setattr(rows, "FUSED_MAX_ROWS", 0)
    hidden, weight, ids = head(machine, dtype)
    chunk_bytes = None if path == "kept" else 100 * machine.vocab * 6

    def run(function, dtype, **options):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        return with_gradients(function(*inputs, ids, 0.8, **options), inputs)

    actual = run(linear_logprob, dtype, backend="triton", chunk_bytes=chunk_bytes)
    assert_all_close_to_truth(
        actual, run(linear_logprob_reference, torch.float64), run(linear_logprob_reference, dtype)
    )


def tokens(machine, num_rows, plan):
    """Per-token arguments on the device; mask and advantages on the host if that is where the plan is made."""
    p = policy_problem(num_rows, num_seqs=16)
    p.advantages[p.seq_ids % 3 == 0] = 0
    place = "cpu" if plan == "host" else machine.device
    moved = {name: getattr(p, name).float().to(machine.device) for name in ("old_logp", "ref_logp")}
    moved |= {name: getattr(p, name).to(machine.device) for name in ("seq_ids", "positions")}
    return {**moved, "advantages": p.advantages.float().to(place), "mask": p.mask.to(place)}


def policy_call(function, machine, dtype, kind, plan, **options):
    hidden, weight, ids = head(machine, torch.bfloat16)
    cfg = policy_config(kind, entropy_coef=0.0, kl_coef=0.0)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
    t = tokens(machine, machine.num_rows, plan)
    old_logp = linear_logprob_reference(hidden, weight, ids).logp + 0.3 * (t["old_logp"].double() % 1 - 0.5)
    if function is linear_policy_loss_reference:
        logp = linear_logprob_reference(hidden, weight, ids).logp
        moved = {name: t[name].to(machine.device) for name in ("advantages", "mask")}
        selected = None
        if cfg.uses_covariance:
            arguments = (logp, old_logp, moved["advantages"], moved["mask"], cfg, t["seq_ids"])
            selected = covariance_select(*arguments, positions=t["positions"])
        values = (old_logp.to(dtype), moved["advantages"].to(dtype), moved["mask"], cfg, t["seq_ids"])
        loss = function(*inputs, ids, *values, selected=selected)
    else:
        values = (old_logp.float(), t["advantages"], t["mask"], cfg, t["seq_ids"])
        with machine.no_waiting():
            loss = function(*inputs, ids, *values, positions=t["positions"], backend="triton", **options).loss
            loss.backward()
        return loss.detach(), *(tensor.grad for tensor in inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["host", "device"])
def test_linear_policy_loss_never_waits(machine, kind, plan):
    arguments = (machine, torch.float64, kind, plan)
    exact = policy_call(linear_policy_loss_reference, *arguments)
    plain = policy_call(linear_policy_loss_reference, machine, torch.bfloat16, kind, plan)
    # The first call compiles the kernels, for which the host waits.
    for _ in range(2):
        chunk_bytes = 100 * machine.vocab * 6
        actual = policy_call(linear_policy_loss, machine, torch.bfloat16, kind, plan, chunk_bytes=chunk_bytes)
    assert_all_close_to_truth(actual, exact, plain)


def test_results_repeat_bit_for_bit(machine):
    first, second = (policy_call(linear_policy_loss, machine, torch.bfloat16, "ppo", "device") for _ in range(2))
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(once, twice)


def test_more_logits_than_int32_can_count(machine):
    """The last rows of a matrix of more than 2**31 logits equal the same rows alone."""
    num_rows = machine.num_rows if machine.device == "cpu" else 2**31 // machine.vocab + 300
    logits = torch.empty(num_rows, machine.vocab, dtype=torch.bfloat16, device=machine.device)
    last = (machine.normal(16, machine.vocab) * 3).bfloat16()
    logits[-16:] = last
    logits[:-16] = last[0]
    ids = machine.ids(num_rows, machine.vocab)

    def run(logits, ids):
        leaf = logits.requires_grad_()
        out = logprob(leaf, ids, backend="triton", inplace_backward=True)
        out.logp.sum().backward()
        return out.logp[-16:], out.entropy[-16:], leaf.grad[-16:]

    for whole, alone in zip(run(logits, ids), run(last.clone(), ids[-16:]), strict=True):
        torch.testing.assert_close(whole, alone)


def test_more_rows_than_grid_y_has(machine):
    num_rows = 200 if machine.device == "cpu" else 70_000
    logits = machine.normal(num_rows, 300)
    ids = machine.ids(num_rows, 300)
    actual, truth = logprob(logits, ids, backend="triton"), logprob_reference(logits.double(), ids)
    assert_close_to_truth(actual.logp, truth.logp, logprob_reference(logits, ids).logp)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss(machine, kind):
    num_rows = 700 if machine.device == "cpu" else 20_000
    p, cfg = policy_problem(num_rows, num_seqs=50), policy_config(kind)
    selected = p.selection(cfg)

    def run(dtype, backend):
        def moved(tensor):
            return tensor.to(machine.device, dtype if tensor.is_floating_point() else None)

        logp, entropy = moved(p.logp).requires_grad_(), moved(p.entropy).requires_grad_()
        result = policy_loss(
            logp,
            moved(p.old_logp),
            moved(p.advantages),
            moved(p.mask),
            cfg,
            moved(p.seq_ids),
            entropy,
            moved(p.ref_logp),
            moved(p.row_weight),
            selected=None if selected is None else moved(selected),
            backend=backend,
        )
        metrics = torch.stack([value for name, value in result.metrics.items() if name != "cov_mean"])
        return result.loss.detach(), metrics, *torch.autograd.grad(result.loss, (logp, entropy))

    assert_all_close_to_truth(run(torch.float32, "triton"), run(torch.float64, "torch"), run(torch.float32, "torch"))


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_covariance_selection_is_the_one_of_the_cpu(machine, kind):
    p, cfg = policy_problem(2000, num_seqs=30), policy_config(kind)
    rest = (p.advantages, p.mask, cfg, p.seq_ids)
    expected = covariance_select(p.logp, p.old_logp, *rest, positions=p.positions)
    moved = [
        value.to(machine.device) if isinstance(value, torch.Tensor) else value for value in (p.logp, p.old_logp, *rest)
    ]
    positions = p.positions.to(machine.device)
    for _ in range(2):
        with machine.no_waiting():
            chosen = covariance_select(*moved, positions=positions)
    assert torch.equal(chosen.cpu(), expected)


def test_memory_stays_within_the_budget(machine):
    """Beyond inputs and gradients: the logits of a chunk with their gradient, and vectors."""
    if machine.device == "cpu":
        num_rows, budget = machine.num_rows, 20 * machine.vocab * 4
    else:
        num_rows, budget = 8192, 1 << 30
    hidden, weight, ids = head(machine, torch.bfloat16, num_rows)
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight)]
    del hidden, weight
    t = tokens(machine, num_rows, "host")
    arguments = (*inputs, ids, t["old_logp"], t["advantages"], t["mask"], PolicyLossConfig())
    # The first call allocates the workspace of the vendor's products.
    linear_policy_loss(*arguments, chunk_bytes=budget, backend="triton").loss.backward()
    inputs[0].grad = inputs[1].grad = None
    before = torch.cuda.memory_allocated() if machine.device == "cuda" else 0
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = linear_policy_loss(*arguments, chunk_bytes=budget, backend="triton")
    peak = torch.cuda.max_memory_allocated() if machine.device == "cuda" else 0
    gradients = inputs[0].numel() * 2 + inputs[1].numel() * 4
    assert peak - before - gradients <= budget + (64 << 20)
    result.loss.backward()


def test_whole_graph_compiles(machine):
    hidden, weight, ids = (head(machine, torch.float32)[index] for index in range(3))
    t = tokens(machine, machine.num_rows, "device")
    cfg = PolicyLossConfig()

    def loss(hidden, weight):
        hidden = torch.nn.functional.silu(hidden)
        arguments = (hidden, weight, ids, t["old_logp"], t["advantages"], t["mask"], cfg)
        return linear_policy_loss(*arguments, backend="triton").loss

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
        value = call(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_another_number_of_rows_compiles_no_kernel(machine):
    if machine.device == "cpu":
        # The interpreter compiles nothing.
        return
    from spear_kernels.linear_policy_loss.kernel import sweep_kernel
    from spear_kernels.logprob.kernel import row_gradient_kernel, row_reduce_kernel
    from spear_kernels.policy_loss.kernel import policy_loss_kernel

    kernels = (sweep_kernel, row_gradient_kernel, row_reduce_kernel, policy_loss_kernel)

    def variants():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    def run(num_rows):
        hidden, weight, ids = head(machine, torch.bfloat16, num_rows)
        t = tokens(machine, num_rows, "device")
        inputs = [hidden.bfloat16().requires_grad_(), weight.bfloat16()]
        arguments = (*inputs, ids, t["old_logp"], t["advantages"], t["mask"], PolicyLossConfig())
        linear_policy_loss(*arguments, backend="triton").loss.backward()
        linear_logprob(*inputs, ids, chunk_bytes=64 * machine.vocab * 6, backend="triton").logp.sum().backward()

    run(96)
    before = variants()
    for num_rows in (97, 128, 1):
        run(num_rows)
    assert variants() == before
