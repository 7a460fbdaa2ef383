"""Token sampling: the right distribution, reproducible draws, log-probs at the sampling temperature."""

from __future__ import annotations

import numpy as np
import torch

from spear_fast.rollout.sampling import sample, uniforms


def draws(count: int, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(uniforms(np.full(count, seed, np.uint64), np.arange(count, dtype=np.uint64)))


def test_uniforms_fill_the_unit_interval_evenly_and_without_correlation():
    values = draws(100_000).numpy()
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    # 49 degrees of freedom: 100 is beyond the 99.99 % point.
    assert ((counts - 2000) ** 2 / 2000).sum() < 100
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_uniforms_depend_on_seed_and_position_only():
    seeds, positions = np.array([1, 2, 1], np.uint64), np.array([5, 5, 6], np.uint64)
    together = uniforms(seeds, positions)
    alone = np.concatenate([uniforms(seeds[i : i + 1], positions[i : i + 1]) for i in range(3)])
    assert (together == alone).all()
    assert len(set(together)) == 3


def test_frequencies_follow_the_softmax_at_temperature():
    logits = torch.tensor([2.0, 0.0, -1.0, float("-inf")])
    count = 200_000
    tokens, logps = sample(logits.expand(count, 4), torch.full((count,), 2.0), draws(count))
    expected = torch.softmax(logits.double() / 2.0, 0)
    seen = torch.bincount(tokens, minlength=4).double() / count
    assert (seen - expected).abs().max() < 0.005
    assert seen[3] == 0
    assert torch.allclose(logps.double(), expected.log()[tokens], atol=1e-6)


def test_temperature_zero_is_greedy_with_logprobs_at_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logps = sample(logits, torch.zeros(1), torch.tensor([0.999], dtype=torch.float64))
    assert tokens.item() == 1
    assert torch.allclose(logps, torch.log_softmax(logits, -1)[:, 1])


def test_extreme_draws_stay_inside_the_vocabulary():
    logits = torch.tensor([[0.0, 0.0, 0.0]]).expand(2, 3)
    tokens, _ = sample(logits, torch.ones(2), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [0, 2]
