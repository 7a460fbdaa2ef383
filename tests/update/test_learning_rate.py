"""The optimizer: schedule, decay of matrices only, clipping, and state that survives a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from spear_fast.checkpoint import load_latest, save
from spear_fast.update.optimizer import Optimizer, OptimizerSettings


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 4), (4,), (2, 3)]]


def take(optimizer: Optimizer, weights: list[torch.nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_warmup_then_constant():
    settings = OptimizerSettings(lr=0.2, warmup_steps=4)
    assert [settings.learning_rate(step) for step in range(6)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert OptimizerSettings(lr=0.2).learning_rate(0) == 0.2


def test_warmup_then_cosine_to_zero():
    settings = OptimizerSettings(lr=0.2, warmup_steps=2, total_steps=10)
    rates = [settings.learning_rate(step) for step in range(11)]
    expected = [0.1, 0.2] + [0.2 * (math.cos(math.pi * step / 8) + 1) / 2 for step in range(9)]
    assert rates == pytest.approx(expected) and rates[10] == 0


def test_rate_follows_the_steps_taken():
    weights = parameters()
    optimizer = Optimizer(weights, OptimizerSettings(lr=0.2, warmup_steps=4, grad_clip=1e9))
    before = weights[1].detach().clone()
    assert optimizer.lr == pytest.approx(0.05)
    take(optimizer, weights, 1)
    # The first step of Adam is lr * sign(gradient).
    torch.testing.assert_close((weights[1] - before).abs(), torch.full((4,), 0.05), atol=1e-4, rtol=0)
    assert optimizer.lr == pytest.approx(0.1) and optimizer.num_steps == 1
    assert all(weight.grad is None for weight in weights)


def test_only_matrices_decay():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = Optimizer(weights, OptimizerSettings(lr=0.1, weight_decay=0.5))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old * (1 - 0.1 * 0.5 if weight.ndim > 1 else 1))


def test_clip_scales_to_the_global_norm():
    weights = parameters()
    optimizer = Optimizer(weights, OptimizerSettings(lr=0.1, grad_clip=0.5))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert optimizer.clip_gradients().item() == pytest.approx(math.sqrt(22))
    assert math.sqrt(sum(weight.grad.square().sum().item() for weight in weights)) == pytest.approx(0.5, rel=1e-4)


def test_frozen_parameters_are_left_alone():
    weights = parameters()
    weights[0].requires_grad_(False)
    before = weights[0].clone()
    optimizer = Optimizer(weights, OptimizerSettings(lr=0.1, weight_decay=0.5))
    take(optimizer, weights[1:], 2)
    assert torch.equal(weights[0], before)


def test_resumed_optimizer_continues_exactly(tmp_path):
    settings = OptimizerSettings(lr=0.1, warmup_steps=5)
    unbroken = parameters()
    optimizer = Optimizer(unbroken, settings)
    take(optimizer, unbroken, 3)
    save(tmp_path, 3, tensors={"optimizer": optimizer.state_dict(), "weights": [w.detach().clone() for w in unbroken]})
    take(optimizer, unbroken, 3, seed=2)
    checkpoint = load_latest(tmp_path)
    resumed = [torch.nn.Parameter(weight) for weight in checkpoint.tensors("weights")]
    second = Optimizer(resumed, settings)
    second.load_state_dict(checkpoint.tensors("optimizer"))
    assert second.num_steps == 3
    take(second, resumed, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(resumed, unbroken, strict=True))
