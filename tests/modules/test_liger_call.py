"""`FusedLinearGRPOLoss` against the installed Liger class in float32, and against its formulas in float64."""

from __future__ import annotations

import inspect
from itertools import product
from random import Random

import pytest
import torch

from spear_kernels import FusedLinearGRPOLoss
from spear_kernels.modules.grpo_terms import LOSS_TYPES, TOKEN_LEVEL_ONLY
from spear_kernels.testing import OperationRecorder

NUM_SEQS, LENGTH, WIDTH, VOCAB = 4, 6, 8, 23
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def liger():
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    return chunked_loss.LigerFusedLinearGRPOLoss


@pytest.fixture(scope="module")
def problem():
    random = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    hidden, weight, bias = normal(NUM_SEQS, LENGTH, WIDTH), normal(VOCAB, WIDTH) * 0.7, normal(VOCAB)
    ids = torch.randint(VOCAB, (NUM_SEQS, LENGTH), generator=random)
    mask = torch.ones(NUM_SEQS, LENGTH, dtype=torch.int64)
    mask[0, 3:] = mask[3, 5:] = 0
    mask[2] = 0
    advantages = normal(NUM_SEQS)
    advantages[1] = 0.5 + advantages[1].abs()
    advantages[0] = -0.5 - advantages[0].abs()
    logits = torch.nn.functional.linear(hidden, weight, bias) / TEMPERATURE
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    return {
        "head": (hidden, weight, bias),
        "tokens": (ids, mask, advantages),
        "old": logp + 0.4 * normal(NUM_SEQS, LENGTH),
        "ref": logp + 0.3 * normal(NUM_SEQS, LENGTH),
        "is_ratio": (0.3 * normal(NUM_SEQS, LENGTH)).exp(),
    }


def results(loss_class, problem, settings, call, dtype=torch.float32, **extra):
    """Loss, metrics, gradients of hidden, weight and bias."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in problem["head"]]
    hidden, weight, bias = inputs
    loss, metrics = loss_class(temperature=TEMPERATURE, **settings, **extra)(
        hidden, weight, *problem["tokens"], bias, **call
    )
    return [loss.detach(), *metrics, *torch.autograd.grad(1.7 * loss, inputs)]


def assert_same(ours, theirs, settings):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6, msg=lambda text: f"{settings}: {text}")


def variants(loss_type, count=10):
    """Settings and what else is given: some of all combinations that matter to the loss."""
    levels = ["token"] if loss_type in TOKEN_LEVEL_ONLY else ["token", "sequence"]
    bounds = [0.28, 2.0] if loss_type == "cispo" else [0.28]
    is_ratios, totals = [None, "token", "sequence"], [None, 50]
    grid = product(levels, bounds, [0.0, 0.3], [None, 1.1, 1.5], [False, True], [False, True], is_ratios, totals)
    sample = Random(loss_type).sample(list(grid), count)
    for level, high, beta, delta, corrected, has_old, is_ratio, num_items in sample:
        settings = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon_high": high,
            "beta": beta,
            "delta": delta,
            "use_bias_correction_kl": corrected,
            "max_completion_length": 9,
        }
        yield settings, has_old, is_ratio, num_items


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option_gives_ligers_values_gradients_and_metrics(loss_type, liger, problem):
    is_ratios = {None: None, "token": problem["is_ratio"], "sequence": problem["is_ratio"][:, :1]}
    for settings, has_old, is_ratio, num_items in variants(loss_type):
        call = {
            "ref_per_token_logps": problem["ref"],
            "old_per_token_logps": problem["old"] if has_old else None,
            "vllm_is_ratio": is_ratios[is_ratio],
            "num_items_in_batch": num_items,
        }
        theirs = results(liger, problem, settings, call, compiled=False)
        assert_same(results(FusedLinearGRPOLoss, problem, settings, call), theirs, (settings, has_old, is_ratio))


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"use_ref_model": False}, {}),
        ({"use_ref_model": False}, {"ref_per_token_logps": "ref"}),
        ({"beta": 0.0}, {"ref_per_token_logps": "ref", "num_items_in_batch": torch.tensor(31)}),
        ({}, {"ref_input": "hidden", "ref_weight": "weight", "ref_bias": "bias"}),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2}, {"ref_per_token_logps": "ref"}),
        ({"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.2}, {"ref_per_token_logps": "ref"}),
    ],
)  # fmt: skip
def test_the_reference_policy_is_found_where_liger_finds_it(settings, call, liger, problem):
    hidden, weight, bias = problem["head"]
    # Near the policy, as a reference is: far from it exp(ref - logp) reaches thousands and float32 sums lose digits.
    named = {"ref": problem["ref"], "hidden": hidden * 1.1, "weight": weight * 0.9, "bias": bias * 0.8}
    call = {name: named[value] if isinstance(value, str) else value for name, value in call.items()}
    call["old_per_token_logps"] = problem["old"]
    theirs = results(liger, problem, settings, call, compiled=False)
    assert_same(results(FusedLinearGRPOLoss, problem, settings, call), theirs, settings)


def test_the_call_is_ligers(liger):
    for method in ("__init__", "forward"):
        theirs = [(p.name, p.default) for p in inspect.signature(getattr(liger, method)).parameters.values()]
        ours = inspect.signature(getattr(FusedLinearGRPOLoss, method)).parameters.values()
        assert [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY] == theirs


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("settings", [{"loss_type": "grpo"}, {"loss_type": "dapo", "delta": 1.5}])
def test_one_sweep_agrees_with_the_loss_written_out_in_float64(settings, has_old, problem):
    """The shares of GRPO and DAPO with k3, written down here from their papers."""
    ids, mask, advantages = problem["tokens"]
    old, ref = problem["old"].double(), problem["ref"].double()
    inputs = [tensor.double().requires_grad_() for tensor in problem["head"]]
    logits = torch.nn.functional.linear(*inputs) / TEMPERATURE
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    loss, lengths = torch.zeros((), dtype=torch.float64), mask.sum(1).tolist()
    for b, t in mask.nonzero().tolist():
        ratio = (logp[b, t] - (old[b, t] if has_old else logp[b, t].detach())).exp()
        a = advantages[b].double()
        bounded = ratio.clamp(max=settings.get("delta", 1e9)) * a
        gap = ref[b, t] - logp[b, t]
        term = -torch.minimum(bounded, ratio.clamp(0.8, 1.28) * a) + 0.3 * (gap.exp() - gap - 1)
        loss = loss + term / (lengths[b] * NUM_SEQS if settings["loss_type"] == "grpo" else sum(lengths))
    truth = [loss.detach(), *torch.autograd.grad(1.7 * loss, inputs)]
    call = {"ref_per_token_logps": ref, "old_per_token_logps": old if has_old else None}
    settings = {**settings, "beta": 0.3, "epsilon_high": 0.28}
    value, _, _, *gradients = results(FusedLinearGRPOLoss, problem, settings, call, dtype=torch.float64)
    for ours, theirs in zip([value, *gradients], truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_rows_without_a_gradient_cost_no_backward_product(problem):
    """(2 + 4 g) NVH: masked rows never enter, and those of advantage 0 stay out of the backward products."""
    ids, mask, advantages = problem["tokens"]
    advantages = advantages.clone()
    advantages[1] = 0.0
    hidden, weight, _ = (tensor.clone().requires_grad_() for tensor in problem["head"])
    with OperationRecorder() as seen:
        loss, _ = FusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(hidden, weight, ids, mask, advantages)
        loss.backward()
    tokens = int(mask.sum())
    live = tokens - int(mask[1].sum())
    assert seen.matrix_flops == (2 * tokens + 4 * live) * VOCAB * WIDTH


@pytest.mark.parametrize(
    ("settings", "problem_in"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg=0.0"),
        ({"epsilon_low": -0.1}, "epsilon_low=-0.1"),
    ],
)
def test_wrong_settings_are_named(settings, problem_in):
    with pytest.raises(ValueError, match=problem_in):
        FusedLinearGRPOLoss(**settings)


def test_wrong_shapes_and_a_missing_reference_are_named(problem):
    hidden, weight, _ = problem["head"]
    ids, mask, advantages = problem["tokens"]
    loss = FusedLinearGRPOLoss(use_ref_model=False)
    with pytest.raises(ValueError, match="_input has shape"):
        loss(hidden[0], weight, ids, mask, advantages)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        loss(hidden, weight, ids, mask[:, 1:], advantages)
    with pytest.raises(ValueError, match="vllm_is_ratio has shape"):
        loss(hidden, weight, ids, mask, advantages, vllm_is_ratio=advantages)
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        FusedLinearGRPOLoss()(hidden, weight, ids, mask, advantages)
