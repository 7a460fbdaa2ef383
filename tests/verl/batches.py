"""Batches, actor settings and calls that the tests of the losses in verl share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig


@dataclass(frozen=True)
class Batch:
    """What verl hands to a loss, [B, T] each."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    rollout_is_weights: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Batch:
        values = {name: value for name, value in vars(self).items() if value is not None and name != "response_mask"}
        return replace(self, **{name: value.to(dtype) for name, value in values.items()})


def random_batch(seed: int, spread: float = 0.6, weighted: bool = False) -> Batch:
    """Six sequences of up to nine tokens in float64, the third without any action token."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(6, 9, generator=generator, dtype=torch.float64)

    old_log_prob = -normal().abs()
    mask = torch.rand(6, 9, generator=generator) > 0.3
    mask[2] = False
    weights = normal().abs() * (torch.rand(6, 9, generator=generator) > 0.2) if weighted else None
    return Batch(old_log_prob, old_log_prob + spread * normal(), normal(), mask, weights)


def actor(
    batch_info: dict[str, Any] | None = None, *, clip_ratio_c: Any = 1.5, entropy_coeff: float = 0.0, **loss: Any
) -> ActorConfig:
    """verl's own actor configuration with distinct bounds on both sides; `loss` goes to its policy_loss."""
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.25,
        clip_ratio_low=None,
        clip_ratio_high=0.31,
        clip_ratio_c=clip_ratio_c,
        entropy_coeff=entropy_coeff,
        policy_loss=PolicyLossConfig(**loss),
        global_batch_info=batch_info or {},
    )


@dataclass(frozen=True)
class Outcome:
    """Loss, its gradient in log_prob [B, T] and the metrics, in float64."""

    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict[str, float]


def run(name: str, batch: Batch, aggregation: str, config: ActorConfig) -> Outcome:
    """Call a loss from verl's registry as verl's `ppo_loss` does."""
    log_prob = batch.log_prob.clone().requires_grad_()
    arguments = {**vars(batch), "log_prob": log_prob}
    loss, metrics = get_policy_loss_fn(name)(**arguments, loss_agg_mode=aggregation, config=config)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient.dtype == log_prob.dtype
    return Outcome(loss.detach().double(), gradient.double(), metrics)


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    """Equal loss, gradient and metrics, relative to the largest number of each."""
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance)
    scale = theirs.gradient.abs().max().item()
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=tolerance, atol=tolerance * scale)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for key, value in theirs.metrics.items():
        assert isinstance(ours.metrics[key], float)
        assert abs(ours.metrics[key] - value) <= tolerance * (1 + abs(value)), key
