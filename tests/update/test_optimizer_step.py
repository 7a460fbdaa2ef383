"""The optimizer step: the paper's gradient, whatever the packing, and no trace of a step that failed."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.scoring import Scorer, fill_ref_logp
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig

KINDS = ("ppo", "clip_cov", "kl_cov", "gspo", "cispo", "reinforce")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LENGTHS = [12, 7, 30, 18, 5, 22, 9, 14]
ONE_BATCH, MANY_BATCHES = 10_000, 32


def config(kind="ppo", aggregation="token-mean", **changes) -> PolicyLossConfig:
    settings = {
        "dual_clip": 3.0,
        "clip_high": 0.28,
        "cov_ratio": 0.2,
        "cov_lower": 0.5,
        "cov_upper": 6.0,
        "norm_length": 40,
    }
    return PolicyLossConfig(kind=kind, aggregation=aggregation, **{**settings, **changes})


@pytest.fixture
def off_policy_rows(policy, new_rows):
    """Rows whose old log-probs lie around the current ones, so that some tokens are clipped and some are not."""

    def make(lengths=LENGTHS, seed=0, first_uid=100):
        rows = new_rows(lengths, seed=seed, first_uid=first_uid)
        noise = np.random.default_rng(seed)
        for row, logp in zip(rows, Scorer(policy, ONE_BATCH, temperature=1.3).score(rows), strict=True):
            row.old_logp = (logp + noise.normal(0, 0.3, len(logp))).astype(np.float32)
        return rows

    return make


def updater_for(policy, token_budget=ONE_BATCH, **settings) -> Updater:
    settings = {"lr": 1e-3, "grad_clip": 1e9, **settings}
    return Updater(policy, OptimizerSettings(**settings), token_budget=token_budget, temperature=1.3)


def gradients(policy, groups, token_budget=ONE_BATCH, seed=5):
    """Gradients of one step, and its metrics; the weights stay."""
    updater, grads = updater_for(policy, token_budget), {}
    updater.optimizer.step = lambda: grads.update(
        {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}
    )
    return grads, updater.optimizer_step(groups, seed)


def assert_same_gradients(actual, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=3e-5 * grad.abs().max().item() + 1e-9, rtol=1e-3, msg=name)


def differ(first, second) -> bool:
    return any((first[name] - second[name]).norm() > 1e-3 * second[name].norm() for name in second)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_depends_neither_on_packing_nor_on_order(policy, off_policy_rows, kind, aggregation):
    rows, cfg = off_policy_rows(), config(kind, aggregation)
    whole, metrics = gradients(policy, [LossGroup(rows, cfg)])
    cut, cut_metrics = gradients(policy, [LossGroup(rows, cfg)], MANY_BATCHES)
    assert (metrics["update/micro_batches"], cut_metrics["update/micro_batches"]) == (1, 4)
    assert_same_gradients(cut, whole)
    assert_same_gradients(gradients(policy, [LossGroup(rows[::-1], cfg)], MANY_BATCHES)[0], whole)
    for name in cut_metrics.keys() - {"update/micro_batches"}:
        assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_covariance_choice_acts_and_follows_its_seed(policy, off_policy_rows, kind):
    group = LossGroup(off_policy_rows(), config(kind))
    cut, metrics = gradients(policy, [group], MANY_BATCHES)
    assert metrics["update/selected_frac"] == pytest.approx(0.2, abs=0.02)
    plain = config("ppo") if kind == "clip_cov" else config(kind, kl_cov_coef=0.0)
    assert differ(cut, gradients(policy, [LossGroup(group.rows, plain)], MANY_BATCHES)[0])
    other_seed = gradients(policy, [group], MANY_BATCHES, seed=6)[0]
    assert differ(cut, other_seed) == (kind == "clip_cov")


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_microbatch_statistics_are_another_choice(policy, off_policy_rows, kind):
    rows, cfg = off_policy_rows(), config(kind)
    parity = LossGroup(rows, cfg, stats="microbatch")
    whole = gradients(policy, [LossGroup(rows, cfg)])[0]
    assert_same_gradients(gradients(policy, [parity])[0], whole)
    assert differ(gradients(policy, [parity], MANY_BATCHES)[0], whole)


def test_joint_step_is_the_weighted_sum_of_its_groups(policy, off_policy_rows):
    fresh = LossGroup(off_policy_rows(), config("clip_cov", "seq-mean-token-sum-norm"))
    replayed = LossGroup(
        off_policy_rows(LENGTHS[:5], seed=1, first_uid=900), config("clip_cov", cov_ratio=0.4), prefix="sil"
    )
    joint, metrics = gradients(policy, [fresh, dataclasses.replace(replayed, coef=0.3)], MANY_BATCHES)
    first, first_metrics = gradients(policy, [fresh])
    second, second_metrics = gradients(policy, [replayed])
    assert_same_gradients(joint, {name: first[name] + 0.3 * second[name] for name in first})
    assert metrics["update/loss"] == pytest.approx(first_metrics["update/loss"], rel=1e-4)
    assert metrics["sil/loss"] == pytest.approx(second_metrics["sil/loss"], rel=1e-4)
    assert metrics["sil/action_tokens"] == sum(row.num_action_tokens for row in replayed.rows)


def test_groups_that_cannot_teach_are_left_out(policy, off_policy_rows):
    rows = off_policy_rows()
    updater = updater_for(policy)
    silent = dataclasses.replace(rows[0], action_mask=np.zeros_like(rows[0].action_mask))
    assert (
        updater.optimizer_step(
            [LossGroup(rows, config(), coef=0.0), LossGroup([], config()), LossGroup([silent], config())], 0
        )
        == {}
    )
    assert updater.optimizer.num_steps == 0
    metrics = updater.optimizer_step([LossGroup(rows, config()), LossGroup([silent], config(), prefix="sil")], 0)
    assert updater.optimizer.num_steps == 1 and not any(name.startswith("sil/") for name in metrics)


def padded_loss_float64(model, rows, cfg, temperature):
    """The PPO loss of algorithm.md section 4 with padding, full logits and plain autograd, for every aggregation."""
    longest = max(row.num_tokens for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attend, mask = (torch.zeros(len(rows), longest, dtype=torch.bool) for _ in range(2))
    old, advantage = (torch.zeros(len(rows), longest, dtype=torch.float64) for _ in range(2))
    for r, row in enumerate(rows):
        ids[r, : row.num_tokens] = torch.from_numpy(row.tokens)
        attend[r, : row.num_tokens] = True
        mask[r, : row.num_tokens] = torch.from_numpy(row.action_mask)
        old[r, : row.num_tokens] = torch.from_numpy(row.old_logp)
        advantage[r, : row.num_tokens] = torch.from_numpy(row.advantages)
    logits = model(ids, attention_mask=attend).logits[:, :-1] / temperature
    logp = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    old, advantage, mask = old[:, 1:], advantage[:, 1:], mask[:, 1:]
    ratio = (logp - old).clamp(-20, 20).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high))
    loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * cfg.dual_clip), loss) * mask
    if cfg.aggregation == "token-mean":
        return loss.sum() / mask.sum()
    per_row = loss.sum(1)
    if cfg.aggregation == "seq-mean-token-mean":
        per_row = per_row / mask.sum(1)
    if cfg.aggregation == "seq-mean-token-sum-norm":
        per_row = per_row / cfg.norm_length
    return per_row.mean()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_equals_padded_float64_autograd(new_policy, new_rows, aggregation, tie):
    policy, rows, cfg = new_policy(tie=tie), new_rows(LENGTHS), config("ppo", aggregation)
    noise = np.random.default_rng(0)
    for row, logp in zip(rows, Scorer(policy, ONE_BATCH, temperature=1.3).score(rows), strict=True):
        row.old_logp = (logp + noise.normal(0, 0.3, len(logp))).astype(np.float32)
    slow = copy.deepcopy(policy.model).double()
    loss = padded_loss_float64(slow, rows, cfg, 1.3)
    loss.backward()
    grads, metrics = gradients(policy, [LossGroup(rows, cfg)], MANY_BATCHES)
    assert metrics["update/loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: parameter.grad.float() for name, parameter in slow.named_parameters()}
    assert_same_gradients(grads, expected)
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in expected.values()))
    assert metrics["update/grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("grad_clip", [1e9, 1e-3])
def test_weights_after_two_steps_equal_plain_adamw(policy, off_policy_rows, grad_clip):
    rows, cfg = off_policy_rows(), config()
    slow = copy.deepcopy(policy.model).double()
    decayed = [parameter for parameter in slow.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in slow.parameters() if parameter.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    updater = updater_for(policy, MANY_BATCHES, weight_decay=0.1, grad_clip=grad_clip)
    for _ in range(2):
        adamw.zero_grad()
        padded_loss_float64(slow, rows, cfg, 1.3).backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), grad_clip)
        adamw.step()
        updater.optimizer_step([LossGroup(rows, cfg)], 0)
    # Adam turns rounding of a near-zero gradient into a step of up to lr; all but a few entries must agree closely.
    for name, parameter in policy.model.named_parameters():
        gap = (parameter.double() - slow.get_parameter(name)).abs()
        assert gap.max() < 2.1e-3 and gap.quantile(0.97) < 2e-5, name


@pytest.mark.parametrize("poison", ["loss", "loss only", "gradient"])
def test_step_that_is_not_finite_leaves_no_trace(policy, off_policy_rows, tmp_path, poison):
    rows = off_policy_rows()
    updater = updater_for(policy, MANY_BATCHES)
    updater.dump_folder = tmp_path / "dumps"
    updater.optimizer_step([LossGroup(rows, config())], 0)
    weights = copy.deepcopy(policy.model.state_dict())
    state = copy.deepcopy(updater.optimizer.state_dict())
    bad = off_policy_rows(seed=3)
    if poison != "gradient":
        bad[4].advantages = np.where(bad[4].action_mask, np.nan if poison == "loss" else np.inf, 0).astype(np.float32)
        if poison == "loss only":
            bad[4].old_logp = bad[4].old_logp - 5  # the ratio is clipped, so the infinite advantage has no gradient
        metrics = updater.optimizer_step([LossGroup(bad, config())], 1)
        assert not math.isfinite(metrics["update/loss"])
        assert math.isfinite(metrics["update/grad_norm"]) == (poison == "loss only")
    else:
        handle = policy.head[0].register_hook(lambda grad: grad * math.inf)
        metrics = updater.optimizer_step([LossGroup(bad, config())], 1)
        handle.remove()
        assert math.isfinite(metrics["update/loss"]) and not math.isfinite(metrics["update/grad_norm"])
    assert metrics["update/skipped_steps"] == 1
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    after = updater.optimizer.state_dict()
    assert after["num_steps"] == state["num_steps"] == 1
    for key, moments in state["adamw"]["state"].items():
        assert all(torch.equal(moments[name], after["adamw"]["state"][key][name]) for name in moments)
    with np.load(tmp_path / "dumps" / "skipped_after_step_000001.npz") as dump:
        uids = dump["uid"].tolist()
        assert dump["length"].sum() == len(dump["tokens"]) == len(dump["advantages"])
    assert bad[4].uid in uids and (len(uids) < len(bad)) == (poison != "gradient")
    good = updater.optimizer_step([LossGroup(rows, config())], 2)
    assert good["update/skipped_steps"] == 0 and updater.optimizer.num_steps == 2
    assert all(math.isfinite(value) for value in good.values())


def test_score_equals_log_softmax_of_plain_logits(new_policy, new_rows):
    for tie in (True, False):
        policy, rows = new_policy(tie=tie), new_rows(LENGTHS)
        scored = updater_for(policy, MANY_BATCHES).score(rows)
        for row, logp in zip(rows, scored, strict=True):
            ids = torch.from_numpy(row.tokens).long()
            with torch.no_grad():
                full = torch.log_softmax(policy.model(ids[None]).logits[0, :-1] / 1.3, -1)
            expected = np.zeros(row.num_tokens, dtype=np.float32)
            expected[1:] = full.gather(1, ids[1:, None])[:, 0].numpy()
            assert logp.dtype == np.float32
            np.testing.assert_allclose(logp, np.where(row.action_mask, expected, 0), atol=2e-5)
    assert updater_for(policy).score([]) == []


def test_reference_kl_is_flat_at_the_reference_and_pulls_back_to_it(policy, off_policy_rows):
    rows, cfg = off_policy_rows(), config(kl_coef=0.5)
    for row in rows:
        row.advantages = np.zeros_like(row.advantages)
    fill_ref_logp(rows, Scorer(policy, ONE_BATCH, temperature=1.3))
    grads, metrics = gradients(policy, [LossGroup(rows, cfg)], MANY_BATCHES)
    assert metrics["update/kl_ref_nats"] == pytest.approx(0, abs=1e-6)
    assert max(grad.abs().max() for grad in grads.values()) < 1e-5
    with torch.no_grad():
        policy.head[0].mul_(1.2)
    updater, kls = updater_for(policy, MANY_BATCHES, lr=3e-4), []
    for _ in range(8):
        kls.append(updater.optimizer_step([LossGroup(rows, cfg)], 0)["update/kl_ref_nats"])
    assert kls[-1] < 0.6 * kls[0]


def test_importance_weights_scale_the_gradient(policy, off_policy_rows):
    rows = off_policy_rows()
    plain = gradients(policy, [LossGroup(rows, config())])[0]
    for row in rows:
        row.weight = np.full(row.num_tokens, 0.5, dtype=np.float32)
    halved = gradients(policy, [LossGroup(rows, config())], MANY_BATCHES)[0]
    assert_same_gradients(halved, {name: 0.5 * grad for name, grad in plain.items()})
    rows[0].weight = None
    mixed = gradients(policy, [LossGroup(rows, config("clip_cov"))], MANY_BATCHES)[0]
    assert_same_gradients(mixed, gradients(policy, [LossGroup(rows, config("clip_cov"))])[0])


def test_supervised_learning_with_the_same_updater(policy, new_rows):
    rows = new_rows(LENGTHS)
    for row in rows:
        row.advantages = row.action_mask.astype(np.float32)
    cfg = PolicyLossConfig(kind="reinforce", aggregation="token-mean")
    updater = Updater(policy, OptimizerSettings(lr=3e-3, total_steps=30, warmup_steps=3), token_budget=MANY_BATCHES)
    metrics = [updater.optimizer_step([LossGroup(rows, cfg, prefix="cold_start")], 0) for _ in range(30)]
    likelihood = np.concatenate([logp[row.action_mask] for row, logp in zip(rows, updater.score(rows), strict=True)])
    assert -likelihood.mean() < 0.5 * metrics[0]["cold_start/loss"]
    assert metrics[0]["update/lr"] == pytest.approx(1e-3) and metrics[-1]["update/lr"] < 1e-4


def test_metric_names_carry_units(policy, off_policy_rows):
    metrics = updater_for(policy).optimizer_step([LossGroup(off_policy_rows(), config())], 0)
    wanted = "loss grad_norm lr entropy_nats clip_frac approx_kl_nats logp_gap_nats skipped_steps action_tokens"
    assert {f"update/{name}" for name in wanted.split()} <= metrics.keys()
    assert 0 < metrics["update/clip_frac"] < 1 and 0 < metrics["update/entropy_nats"] < math.log(64)
    assert metrics["update/logp_gap_nats"] == pytest.approx(0.24, abs=0.06)  # mean |normal(0, 0.3)|
