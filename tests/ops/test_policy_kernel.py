"""The Triton code of the policy losses against the torch formulas and float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from spear_kernels import policy_loss
from spear_kernels.policy_loss import launch
from spear_kernels.policy_loss.config import AGGREGATIONS, KINDS, KL_KINDS, PolicyLossConfig
from spear_kernels.policy_loss.inputs import TokenInputs
from spear_kernels.policy_loss.kernel import token_terms
from spear_kernels.policy_loss.terms import token_terms as torch_terms
from spear_kernels.testing import OperationRecorder, assert_close_to_truth, policy_config, policy_problem

NUM_ROWS = 301
FLOATS = ("logp", "old_logp", "advantages", "row_weight", "ref_logp", "sequence_ratio")


@triton.jit
def _terms_kernel(
    floats, selected, out, num_rows, clip_low, clip_high, dual_clip, kl_cov_coef, kl_coef,
    KIND: tl.constexpr, KL_KIND: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    live = row < num_rows
    logp = tl.load(floats + row, mask=live, other=0.0)
    old_logp = tl.load(floats + num_rows + row, mask=live, other=0.0)
    advantage = tl.load(floats + 2 * num_rows + row, mask=live, other=0.0)
    row_weight = tl.load(floats + 3 * num_rows + row, mask=live, other=0.0)
    ref_logp = tl.load(floats + 4 * num_rows + row, mask=live, other=0.0)
    sequence_ratio = tl.load(floats + 5 * num_rows + row, mask=live, other=0.0)
    chosen = tl.load(selected + row, mask=live, other=0) != 0
    policy, kl, d_logp, ratio, low, high, dual = token_terms(
        logp, old_logp, advantage, row_weight, ref_logp, chosen, sequence_ratio,
        clip_low, clip_high, dual_clip, kl_cov_coef, kl_coef, KIND, KL_KIND, HAS_DUAL_CLIP, HAS_REF,
    )  # fmt: skip
    tl.store(out + row, policy, mask=live)
    tl.store(out + num_rows + row, kl, mask=live)
    tl.store(out + 2 * num_rows + row, d_logp, mask=live)
    tl.store(out + 3 * num_rows + row, ratio, mask=live)
    tl.store(out + 4 * num_rows + row, low.to(tl.float32), mask=live)
    tl.store(out + 5 * num_rows + row, high.to(tl.float32), mask=live)
    tl.store(out + 6 * num_rows + row, dual.to(tl.float32), mask=live)


def random_rows(seed):
    """Float32 rows [6, N] whose log-ratios reach beyond every bound, some of them exactly 0 or hundreds of nats."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, NUM_ROWS, generator=random)
    logp = -rows[0].abs() * 3
    old_logp, ref_logp = logp + rows[1] * 0.5, logp + rows[4] * 0.5
    old_logp[:20], ref_logp[:20] = logp[:20], logp[:20]
    old_logp[20:40] += 300 * rows[5, 20:40]
    ref_logp[40:60] += 300 * rows[5, 40:60]
    ref_logp[60:80] = logp[60:80] + 1e-3 * rows[4, 60:80]
    advantages = rows[2].clone()
    advantages[80:90] = 0
    return torch.stack([logp, old_logp, advantages, rows[3].abs(), ref_logp, rows[5].exp()])


def kernel_terms(rows, selected, cfg, has_ref):
    out = torch.empty(7, NUM_ROWS)
    _terms_kernel[(1,)](
        rows, selected.to(torch.int8), out, NUM_ROWS,
        cfg.clip_low, cfg.clip_high, cfg.dual_clip or 0.0, cfg.kl_cov_coef, cfg.kl_coef,
        KINDS.index(cfg.kind), KL_KINDS.index(cfg.kl_kind), cfg.dual_clip is not None, has_ref, 512,
    )  # fmt: skip
    return out


def expected_terms(rows, selected, cfg, has_ref):
    named = dict(zip(FLOATS, rows, strict=True))
    ones = torch.ones(NUM_ROWS, dtype=rows.dtype)
    inputs = TokenInputs(
        old_logp=named["old_logp"],
        advantages=named["advantages"],
        mask=ones.bool(),
        aggregation_weight=ones,
        row_weight=named["row_weight"],
        ref_logp=named["ref_logp"] if has_ref else None,
        selected=selected if cfg.uses_covariance else None,
    )
    terms = torch_terms(named["logp"], inputs, cfg, named["sequence_ratio"] if cfg.kind == "gspo" else None)
    s = terms.surrogate
    kl = torch.zeros_like(ones) if terms.kl is None else terms.kl
    flags = [flag.to(rows.dtype) for flag in (s.clipped_low, s.clipped_high, s.dual_clipped)]
    return torch.stack([terms.policy, kl, terms.d_logp, s.ratio, *flags])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl_kind", [*KL_KINDS, None])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_token_terms_equal_the_torch_formulas(kind, kl_kind, dual_clip):
    cfg = PolicyLossConfig(kind, clip_high=0.28, dual_clip=dual_clip, kl_coef=0.3, kl_kind=kl_kind or "k3")
    rows = random_rows(KINDS.index(kind))
    selected = torch.arange(NUM_ROWS) % 3 == 0
    actual = kernel_terms(rows, selected, cfg, kl_kind is not None)
    truth = expected_terms(rows.double(), selected, cfg, kl_kind is not None)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, truth.float(), rtol=2e-5, atol=1e-7)


def test_a_nan_in_an_action_token_is_not_hidden():
    rows = random_rows(0)
    rows[0, 7] = torch.nan
    policy, _, d_logp, *_ = kernel_terms(rows, torch.zeros(NUM_ROWS, dtype=torch.bool), PolicyLossConfig(), True)
    assert torch.isnan(policy[7])
    assert torch.isnan(d_logp[7])


@pytest.fixture
def small_blocks(monkeypatch):
    """Several programs, and several chunks of programs, for few tokens."""
    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "CHUNK", 2)


def evaluate(p, cfg, dtype, backend, **options):
    """The result and the gradients in logp and entropy; `options` replace arguments."""
    names = ("logp", "old_logp", "advantages", "entropy", "ref_logp", "row_weight")
    arguments = {name: getattr(p, name).detach().to(dtype) for name in names}
    arguments.update(mask=p.mask, seq_ids=p.seq_ids, positions=p.positions, **options)
    leaves = [arguments["logp"].requires_grad_(), arguments["entropy"].requires_grad_()]
    result = policy_loss(cfg=cfg, backend=backend, **arguments)
    return result, torch.autograd.grad(result.loss, leaves, allow_unused=True)


def assert_backends_agree(p, cfg, **options):
    """Triton's loss, metrics and gradients equal float64's, the gradients as closely as torch's in float32."""
    for name in ("logp", "old_logp", "advantages", "entropy", "ref_logp", "row_weight"):
        setattr(p, name, getattr(p, name).float().double())
    if cfg.uses_covariance and "selected" not in options:
        options["selected"] = p.selection(cfg)
    truth, true_grads = evaluate(p, cfg, torch.float64, "torch", **options)
    _, plain_grads = evaluate(p, cfg, torch.float32, "torch", **options)
    actual, grads = evaluate(p, cfg, torch.float32, "triton", **options)
    assert list(actual.metrics) == list(truth.metrics)
    for name, value in truth.metrics.items():
        assert not actual.metrics[name].requires_grad
        torch.testing.assert_close(actual.metrics[name], value.float(), rtol=1e-5, atol=2e-6, msg=name, equal_nan=True)
    assert actual.loss == actual.metrics["loss"]
    for grad, true, naive in zip(grads, true_grads, plain_grads, strict=True):
        assert (grad is None) == (true is None)
        if grad is not None and grad.numel():
            assert_close_to_truth(grad, true, naive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_kernel_equals_torch(kind, aggregation, small_blocks):
    cfg = policy_config(kind, aggregation, tis_cap=1.2)
    p = policy_problem(75, seed=AGGREGATIONS.index(aggregation), spread=0.6)
    noise = torch.randn(75, generator=torch.Generator().manual_seed(2))
    assert_backends_agree(p, cfg, sampler_logp=p.old_logp.float() + 0.5 * noise)


@pytest.mark.parametrize("num_rows", [0, 1, 16, 33, 511, 513, 1300])
def test_any_number_of_tokens(num_rows):
    assert_backends_agree(policy_problem(num_rows, seed=1), policy_config("clip_cov"))


@pytest.mark.parametrize("changes", [{"entropy": None}, {"ref_logp": None}, {"row_weight": None}, {"mask": None}])
def test_arguments_that_may_be_missing(changes, small_blocks):
    cfg = policy_config(entropy_coef=0.0, kl_coef=0.0, dual_clip=None)
    p = policy_problem(40)
    arguments = {"entropy": p.entropy.float(), "ref_logp": p.ref_logp.float(), "row_weight": p.row_weight.float()}
    arguments = {"logp": p.logp.float(), "mask": p.mask, **arguments, **changes}
    rest = {"old_logp": p.old_logp.float(), "advantages": p.advantages.float(), "cfg": cfg}
    actual, expected = (policy_loss(**arguments, **rest, backend=backend) for backend in ("triton", "torch"))
    assert list(actual.metrics) == list(expected.metrics)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("count", [50, 50.0, torch.tensor(50), torch.tensor(50.0), 0, torch.tensor(0)])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum-norm", "seq-mean-token-mean"])
def test_given_counts(count, aggregation, small_blocks):
    assert_backends_agree(policy_problem(40), policy_config("ppo", aggregation), num_tokens=count, num_seqs=count)


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratios_of_ninety_nats(kind, small_blocks):
    p = policy_problem(48)
    p.old_logp = p.logp + torch.where(torch.arange(48) % 2 == 0, 90.0, -90.0)
    p.ref_logp = p.old_logp.clone()
    assert_backends_agree(p, policy_config(kind))


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("chosen", [True, False])
def test_all_or_no_tokens_chosen(kind, chosen, small_blocks):
    selected = torch.full((48,), chosen)
    assert_backends_agree(policy_problem(48), policy_config(kind), selected=selected)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_choice_made_inside(kind, small_blocks):
    assert_backends_agree(policy_problem(48, seed=3), policy_config(kind), selected=None, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_action_tokens(kind, small_blocks):
    p = policy_problem(40)
    p.mask[:] = False
    result, grads = evaluate(p, policy_config(kind, "seq-mean-token-mean"), torch.float32, "triton")
    assert result.loss == 0
    assert all(value == 0 for value in result.metrics.values())
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_nan(kind, small_blocks):
    clean, dirty = policy_problem(48), policy_problem(48)
    for name in ("logp", "entropy", "old_logp", "ref_logp", "advantages", "row_weight"):
        getattr(dirty, name)[~dirty.mask] = torch.nan
    cfg = policy_config(kind, "seq-mean-token-mean", tis_cap=1.2)
    sampler_logp = torch.where(dirty.mask, clean.old_logp - 0.1, torch.nan).float()
    expected, clean_grads = evaluate(clean, cfg, torch.float32, "triton", sampler_logp=clean.old_logp.float() - 0.1)
    actual, grads = evaluate(dirty, cfg, torch.float32, "triton", sampler_logp=sampler_logp)
    torch.testing.assert_close(actual.metrics, expected.metrics)
    torch.testing.assert_close(grads, clean_grads)


def test_half_precision_and_strided_inputs_are_read_as_they_are(small_blocks):
    p, cfg = policy_problem(48), policy_config()
    for name in ("logp", "old_logp", "advantages", "entropy", "ref_logp", "row_weight"):
        setattr(p, name, torch.stack([getattr(p, name).bfloat16()] * 2, 1)[:, 0])
    arguments = (p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, p.entropy, p.ref_logp, p.row_weight)
    logp = p.logp.detach().requires_grad_()
    results = [policy_loss(logp, *arguments, backend=backend) for backend in ("triton", "torch")]
    grads = [torch.autograd.grad(result.loss, logp)[0] for result in results]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(*grads)


def test_is_one_launch_without_host_syncs(monkeypatch):
    launches = []

    class Counting:
        def __getitem__(self, grid):
            return lambda *_, **__: launches.append(grid)

    monkeypatch.setattr(launch, "_kernel", Counting())
    p, cfg = policy_problem(600), policy_config("clip_cov")
    logp, entropy = (tensor.detach().float().requires_grad_() for tensor in (p.logp, p.entropy))
    old_logp, advantages, ref_logp = (tensor.float() for tensor in (p.old_logp, p.advantages, p.ref_logp))
    with OperationRecorder() as forward:
        result = policy_loss(
            logp, old_logp, advantages, p.mask, cfg, None, entropy, ref_logp, selected=p.mask, backend="triton"
        )
    with OperationRecorder() as backward:
        result.loss.backward()
    assert launches == [(2,)]
    bookkeeping = {"policy_loss", "detach", "unbind", "to", "empty", "new_empty"}
    assert forward.names - bookkeeping <= {"zeros", "zero_", "fill_"}
    assert not backward.host_syncs


def test_backward_repeats_and_scales(small_blocks):
    p = policy_problem(48)
    logp, entropy = (tensor.detach().float().requires_grad_() for tensor in (p.logp, p.entropy))
    arguments = [tensor.float() for tensor in (p.old_logp, p.advantages)]
    loss = policy_loss(
        logp, *arguments, p.mask, policy_config(kl_coef=0.0), None, entropy, backend="triton"
    ).loss  # fmt: skip
    first = torch.autograd.grad(loss, (logp, entropy), retain_graph=True)
    again = torch.autograd.grad(loss * -3, (logp, entropy))
    for plain, scaled in zip(first, again, strict=True):
        torch.testing.assert_close(scaled, plain * -3)


def test_same_bits_every_time(small_blocks):
    p, cfg = policy_problem(200), policy_config("ppo", "seq-mean-token-mean")
    first, second = (evaluate(p, cfg, torch.float32, "triton") for _ in range(2))
    assert first[0].metrics == second[0].metrics
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
