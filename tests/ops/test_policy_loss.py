"""policy_loss: every kind and aggregation against a token loop, gradients, masks, splits and metrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spear_kernels import PolicyLossConfig, policy_loss
from spear_kernels.policy_loss import join_metrics, policy_loss_reference
from spear_kernels.policy_loss.config import AGGREGATIONS, KINDS, KL_KINDS
from spear_kernels.policy_loss.inputs import PolicyBatch
from spear_kernels.policy_loss.metrics import METRICS
from spear_kernels.testing import OperationRecorder, policy_config, policy_problem

NUM_ROWS = 48


def loss_of(p, cfg, logp=None, entropy=None, **options):
    logp = p.logp if logp is None else logp
    entropy = p.entropy if entropy is None else entropy
    return policy_loss(
        logp,
        p.old_logp,
        p.advantages,
        p.mask,
        cfg,
        p.seq_ids,
        entropy,
        p.ref_logp,
        p.row_weight,
        **{"positions": p.positions, **options},
    )


def slow_surrogate(cfg, advantage, logp, old_logp, mean_gap, chosen):
    """The policy term of one token in Python floats; `mean_gap` is the sequence's mean log-ratio."""
    gap = logp - old_logp
    ratio = math.exp(min(mean_gap, 10)) if cfg.kind == "gspo" else math.exp(min(max(gap, -20), 20))
    clipped = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
    if cfg.kind == "reinforce":
        return -advantage * logp
    if cfg.kind == "cispo":
        return -clipped * advantage * logp
    if cfg.kind == "kl_cov":
        return -advantage * ratio + (cfg.kl_cov_coef * abs(gap) if chosen else 0.0)
    if cfg.kind == "clip_cov" and chosen:
        return 0.0
    loss = max(-advantage * ratio, -advantage * clipped)
    if cfg.dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * cfg.dual_clip)
    return loss


def slow_loss(p, cfg, chosen):
    chosen = torch.zeros_like(p.mask) if chosen is None else chosen
    sequences: dict[int, list[int]] = {}
    for n in range(len(p.logp)):
        if p.mask[n]:
            sequences.setdefault(int(p.seq_ids[n]), []).append(n)
    if not sequences:
        return 0.0
    per_sequence = []
    for rows in sequences.values():
        mean_gap = sum(float(p.logp[n] - p.old_logp[n]) for n in rows) / len(rows)
        losses = []
        for n in rows:
            logp, entropy = float(p.logp[n]), float(p.entropy[n])
            value = slow_surrogate(cfg, float(p.advantages[n]), logp, float(p.old_logp[n]), mean_gap, chosen[n])
            d = min(max(logp - float(p.ref_logp[n]), -20), 20)
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[cfg.kl_kind]
            losses.append(float(p.row_weight[n]) * value + cfg.kl_coef * kl - cfg.entropy_coef * entropy)
        per_sequence.append(losses)
    if cfg.aggregation == "token-mean":
        return sum(map(sum, per_sequence)) / sum(map(len, per_sequence))
    if cfg.aggregation == "seq-mean-token-mean":
        return sum(sum(losses) / len(losses) for losses in per_sequence) / len(per_sequence)
    norm = cfg.norm_length if cfg.aggregation == "seq-mean-token-sum-norm" else 1
    return sum(sum(losses) / norm for losses in per_sequence) / len(per_sequence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_equals_the_token_loop(kind, aggregation):
    for seed, kl_kind in enumerate(KL_KINDS):
        cfg = policy_config(kind, aggregation, kl_kind=kl_kind)
        p = policy_problem(NUM_ROWS, seed=seed, spread=0.6)
        chosen = p.selection(cfg)
        assert loss_of(p, cfg).loss.item() == pytest.approx(slow_loss(p, cfg, chosen), rel=1e-10)
        reference = policy_loss_reference(
            p.logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, p.entropy, p.ref_logp, p.row_weight, chosen
        )
        assert reference.item() == pytest.approx(slow_loss(p, cfg, chosen), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_weight_is_a_constant_factor_of_the_surrogate(kind):
    """Truncated importance weights multiply like row weights, in value, gradient and definition."""
    p = policy_problem(NUM_ROWS, seed=4, spread=0.6)
    sampler_logp = p.ref_logp.clone()
    sampler_logp[:6] = p.old_logp[:6] + torch.tensor([0, 25, -25, 80, -80, 0.3]).double()
    weight = (p.old_logp - sampler_logp).clamp(-20, 20).exp().clamp(max=1.4)
    capped, plain = policy_config(kind, tis_cap=1.4), policy_config(kind)
    logp = p.logp.clone().requires_grad_()
    actual = loss_of(p, capped, logp, sampler_logp=sampler_logp, selected=p.selection(plain))
    reference = policy_loss_reference(
        logp, p.old_logp, p.advantages, p.mask, capped, p.seq_ids, p.entropy, p.ref_logp, None, p.selection(plain),
        sampler_logp,
    )  # fmt: skip
    p.row_weight = p.row_weight * weight
    expected = loss_of(p, plain, logp, selected=p.selection(plain))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(actual.loss, logp), torch.autograd.grad(expected.loss, logp))
    p.row_weight = weight
    torch.testing.assert_close(loss_of(p, plain, selected=p.selection(plain)).loss, reference.detach())


def test_no_mask_means_every_row():
    p = policy_problem(NUM_ROWS)
    p.mask[:] = True
    expected = loss_of(p, policy_config("clip_cov"))
    p.mask = None
    actual = loss_of(p, policy_config("clip_cov"))
    assert actual.loss == expected.loss
    assert actual.metrics == expected.metrics


def test_rows_on_another_device_are_copied_without_waiting():
    p = policy_problem(NUM_ROWS)
    device = torch.device("meta")
    batch = PolicyBatch(p.old_logp.to(device), p.advantages, p.mask, row_weight=p.row_weight)
    with CopyRecorder() as copies:
        moved = batch.check(NUM_ROWS, PolicyLossConfig(), True, device)
    assert all(tensor.device == device for tensor in (moved.old_logp, moved.advantages, moved.mask, moved.row_weight))
    assert copies.non_blocking == [True, True, True]


class CopyRecorder(TorchDispatchMode):
    """Notes of every copy whether it was asked not to wait."""

    def __init__(self):
        super().__init__()
        self.non_blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy":
            self.non_blocking.append(bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_equal_autograd_of_the_reference(kind, aggregation):
    cfg = policy_config(kind, aggregation)
    p = policy_problem(NUM_ROWS, seed=3, spread=0.6)
    logp, entropy = p.logp.clone().requires_grad_(), p.entropy.clone().requires_grad_()
    grads = torch.autograd.grad(loss_of(p, cfg, logp, entropy).loss, (logp, entropy))
    reference = policy_loss_reference(
        logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids, entropy, p.ref_logp, p.row_weight, p.selection(cfg)
    )
    truth = torch.autograd.grad(reference, (logp, entropy))
    for actual, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


# GSPO and CISPO hold a factor constant on purpose, so their gradient is not the derivative of their value.
@pytest.mark.parametrize("kind", ["ppo", "clip_cov", "kl_cov", "reinforce"])
def test_gradcheck(kind):
    cfg, p = policy_config(kind), policy_problem(20, seed=5)
    chosen = p.selection(cfg)
    inputs = (p.logp.requires_grad_(), p.entropy.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: loss_of(p, cfg, a, b, selected=chosen).loss, inputs)

    def reference(logp, entropy):
        rest = (p.old_logp, p.advantages, p.mask, cfg, p.seq_ids)
        return policy_loss_reference(logp, *rest, entropy, p.ref_logp, p.row_weight, chosen)

    assert torch.autograd.gradcheck(reference, inputs)


def test_backward_repeats():
    p, cfg = policy_problem(NUM_ROWS), policy_config()
    inputs = (p.logp.requires_grad_(), p.entropy.requires_grad_())
    loss = loss_of(p, cfg, *inputs).loss
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_entropy_without_a_coefficient_gets_no_gradient():
    p = policy_problem(NUM_ROWS)
    logp, entropy = p.logp.requires_grad_(), p.entropy.requires_grad_()
    loss_of(p, policy_config(entropy_coef=0.0), logp, entropy).loss.backward()
    assert entropy.grad is None
    assert logp.grad.abs().max() > 0


def test_gspo_gradient_is_the_sequence_ratio():
    p = policy_problem(30, num_seqs=3)
    cfg = PolicyLossConfig(kind="gspo", clip_low=9.0, clip_high=9.0)
    logp = p.logp.requires_grad_()
    policy_loss(logp, p.old_logp, p.advantages, p.mask, cfg, p.seq_ids).loss.backward()
    for n in p.mask.nonzero().flatten().tolist():
        rows = p.mask & (p.seq_ids == p.seq_ids[n])
        ratio = (p.logp - p.old_logp)[rows].mean().exp().item()
        assert logp.grad[n].item() == pytest.approx(-p.advantages[n].item() * ratio / p.mask.sum().item())


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from(AGGREGATIONS), st.integers(1, 4))
def test_micro_batches_add_up_to_the_batch(seed, kind, aggregation, num_parts):
    """Whole sequences are dealt to parts; global counts and one global choice make the sum exact."""
    cfg = policy_config(kind, aggregation)
    p = policy_problem(NUM_ROWS, seed=seed)
    whole_logp, whole_entropy = p.logp.clone().requires_grad_(), p.entropy.clone().requires_grad_()
    whole = loss_of(p, cfg, whole_logp, whole_entropy, seed=7)
    whole.loss.backward()
    chosen = p.selection(cfg, seed=7)
    num_tokens, num_seqs = p.mask.sum(), len(p.seq_ids[p.mask].unique())
    logp, entropy = p.logp.clone().requires_grad_(), p.entropy.clone().requires_grad_()
    losses, metrics = [], []
    for part in range(num_parts):
        rows = ((p.seq_ids // 1000) % num_parts == part).nonzero()[:, 0]
        result = policy_loss(
            logp[rows],
            p.old_logp[rows],
            p.advantages[rows],
            p.mask[rows],
            cfg,
            p.seq_ids[rows],
            entropy[rows],
            p.ref_logp[rows],
            p.row_weight[rows],
            selected=None if chosen is None else chosen[rows],
            num_tokens=num_tokens,
            num_seqs=num_seqs,
        )
        losses.append(result.loss)
        metrics.append(result.metrics)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(torch.stack(losses).sum(), whole.loss)
    torch.testing.assert_close(logp.grad, whole_logp.grad)
    torch.testing.assert_close(entropy.grad, whole_entropy.grad)
    joined = join_metrics(metrics)
    assert {name for name in whole.metrics if not name.startswith("cov_")} <= set(joined)
    for name, value in joined.items():
        if not name.startswith("cov_"):
            torch.testing.assert_close(value, whole.metrics[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_contribute_nothing_even_as_nan_or_infinity(kind):
    cfg, p = policy_config(kind), policy_problem(NUM_ROWS, seed=2)
    clean = loss_of(p, cfg)
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = policy_problem(NUM_ROWS, seed=2)
        for name in ("logp", "entropy", "old_logp", "ref_logp", "advantages", "row_weight"):
            getattr(dirty, name)[~dirty.mask] = poison
        logp, entropy = dirty.logp.requires_grad_(), dirty.entropy.requires_grad_()
        result = loss_of(dirty, cfg, logp, entropy)
        assert result.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
        for name, value in result.metrics.items():
            torch.testing.assert_close(value, clean.metrics[name])
        result.loss.backward()
        assert (logp.grad[~dirty.mask] == 0).all()
        assert (entropy.grad[~dirty.mask] == 0).all()
        assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_rows", [0, 9])
def test_batch_without_action_tokens(kind, aggregation, num_rows):
    p = policy_problem(num_rows)
    p.mask[:] = False
    logp = p.logp.requires_grad_()
    result = loss_of(p, policy_config(kind, aggregation), logp)
    result.loss.backward()
    assert result.loss.item() == 0
    assert (logp.grad == 0).all()
    assert all(value.item() == 0 for value in result.metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratio_beyond_sixty_nats(kind):
    p = policy_problem(NUM_ROWS)
    p.old_logp = p.logp + torch.where(torch.arange(NUM_ROWS) % 2 == 0, 90.0, -90.0)
    logp = p.logp.float().requires_grad_()
    result = loss_of(p, policy_config(kind, dual_clip=None), logp)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(value) for value in result.metrics.values())


def test_gradient_is_zero_outside_the_log_ratio_clamp():
    cfg = PolicyLossConfig(kind="kl_cov", cov_ratio=0.0)
    logp = torch.zeros(2, requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    policy_loss(logp, torch.tensor([25.0, 15.0]), torch.ones(2), mask, cfg).loss.backward()
    assert logp.grad[0] == 0
    assert logp.grad[1] != 0


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    mask = torch.ones(1, dtype=torch.bool)
    logp = torch.tensor([2.0], requires_grad=True)
    result = policy_loss(logp, torch.zeros(1), -torch.ones(1), mask, PolicyLossConfig(dual_clip=3.0))
    result.loss.backward()
    assert result.loss.item() == 3.0
    assert logp.grad.item() == 0
    assert result.metrics["dual_clip_fraction"].item() == 1


@pytest.mark.parametrize("grad_output", [-3.0, 0.0, 1e4])
def test_output_gradient_scales(grad_output):
    p, cfg = policy_problem(NUM_ROWS), policy_config()
    logp = p.logp.requires_grad_()
    plain = torch.autograd.grad(loss_of(p, cfg, logp).loss, logp)[0]
    scaled = torch.autograd.grad(loss_of(p, cfg, logp).loss * grad_output, logp)[0]
    torch.testing.assert_close(scaled, plain * grad_output)


def test_row_weight_multiplies_the_surrogate_only():
    p = policy_problem(NUM_ROWS)
    p.row_weight = torch.full((NUM_ROWS,), 0.25).double()
    cfg = policy_config()
    weighted = loss_of(p, cfg).metrics
    p.row_weight = torch.ones(NUM_ROWS).double()
    plain = loss_of(p, cfg).metrics
    torch.testing.assert_close(weighted["policy_loss"], plain["policy_loss"] / 4)
    extra = plain["loss"] - plain["policy_loss"]
    torch.testing.assert_close(weighted["loss"] - weighted["policy_loss"], extra)


def test_metrics_against_plain_means():
    p = policy_problem(200, spread=0.5)
    p.row_weight[:] = 1
    cfg = policy_config("clip_cov", cov_ratio=0.1, dual_clip=1.5, tis_cap=1.5)
    sampler_logp = p.ref_logp.clone()
    got = loss_of(p, cfg, sampler_logp=sampler_logp).metrics
    weight = (p.old_logp - sampler_logp)[p.mask].exp()
    m, gap, adv = p.mask, (p.logp - p.old_logp)[p.mask], p.advantages[p.mask]
    ratio = gap.exp()
    low, high = (adv < 0) & (ratio < 0.8), (adv > 0) & (ratio > 1.28)
    cov = (adv - adv.mean()) * (p.logp[m] - p.logp[m].mean())
    d = p.logp[m] - p.ref_logp[m]
    expected = {
        "clip_fraction": (low | high).double().mean(),
        "clip_fraction_low": low.double().mean(),
        "clip_fraction_high": high.double().mean(),
        "dual_clip_fraction": ((adv < 0) & (ratio > 1.5)).double().mean(),
        "selected_fraction": p.selection(cfg)[m].double().mean(),
        "dropped_tokens": p.selection(cfg)[m].double().sum(),
        "ratio_mean": ratio.mean(),
        "ess": ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()),
        "approx_kl_k1": -gap.mean(),
        "approx_kl_k3": (ratio - 1 - gap).mean(),
        "logp_gap_mean_abs": gap.abs().mean(),
        "num_tokens": m.sum().double(),
        "entropy": p.entropy[m].mean(),
        "kl_ref": (torch.exp(-d) - 1 + d).mean(),
        "tis_weight_mean": weight.clamp(max=1.5).mean(),
        "tis_clip_fraction": (weight > 1.5).double().mean(),
        "cov_mean": cov.mean(),
        "cov_p50": cov.sort().values[(len(cov) - 1) // 2],
        "cov_p99": cov.sort().values[int((len(cov) - 1) * 0.99)],
        "cov_max": cov.max(),
    }
    assert set(got) == {"loss", "policy_loss", *expected} == set(METRICS)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)
        assert not got[name].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_no_host_sync_in_loss_and_backward(kind):
    p = policy_problem(NUM_ROWS)
    logp = p.logp.requires_grad_()
    with OperationRecorder() as seen:
        loss_of(p, policy_config(kind, "seq-mean-token-mean"), logp, positions=None).loss.backward()
    assert not seen.host_syncs


def test_half_precision_logp_is_computed_in_float32():
    p, cfg = policy_problem(NUM_ROWS), policy_config()
    logp = p.logp.bfloat16().requires_grad_()
    loss = loss_of(p, cfg, logp, p.entropy.float()).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert logp.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (PolicyLossConfig(kind="gspo"), {"seq_ids": None}, "seq_ids"),
        (PolicyLossConfig(aggregation="seq-mean-token-sum"), {"seq_ids": None}, "seq_ids"),
        (PolicyLossConfig(entropy_coef=0.1), {"entropy": None}, "entropy"),
        (PolicyLossConfig(kl_coef=0.1), {"ref_logp": None}, "ref_logp"),
        (PolicyLossConfig(), {"selected": torch.zeros(10, dtype=torch.bool)}, "selected"),
        (PolicyLossConfig(), {"advantages": torch.zeros(3)}, "advantages"),
        (PolicyLossConfig(tis_cap=2.0), {}, "sampler_logp"),
        (PolicyLossConfig(), {"sampler_logp": torch.zeros(10)}, "tis_cap"),
        (PolicyLossConfig(tis_cap=2.0), {"sampler_logp": torch.zeros(3)}, "sampler_logp"),
        (PolicyLossConfig(), {"backend": "triton"}, "float64"),
    ],
)
def test_bad_arguments_are_named(cfg, change, message):
    p = policy_problem(10)
    names = ("logp", "old_logp", "advantages", "mask", "seq_ids", "entropy", "ref_logp")
    arguments = {name: getattr(p, name) for name in names}
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**arguments, "cfg": cfg, **change})
