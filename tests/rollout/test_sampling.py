"""Token sampling: the right distribution, reproducible draws, log-probs at the sampling temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spear_fast.rollout.sampling import nucleus, sample, uniforms


def draws(count: int, seed: int = 3) -> torch.Tensor:
    return torch.from_numpy(uniforms(np.full(count, seed, np.uint64), np.arange(count, dtype=np.uint64)))


def nucleus_logps(logits: torch.Tensor, top_p: float) -> list[dict[int, float]]:
    """By row of logits [N, V], the log-probs of the tokens that may be drawn: one by one from the likeliest on."""
    rows = []
    for row in torch.softmax(logits.double(), -1).tolist():
        kept: list[int] = []
        for token in sorted(range(len(row)), key=lambda token: -row[token]):
            if sum(row[each] for each in kept) >= top_p:
                break
            kept.append(token)
        total = sum(row[each] for each in kept)
        rows.append({token: math.log(row[token] / total) for token in kept})
    return rows


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


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.95, 1.0])
def test_a_nucleus_holds_the_likeliest_tokens_and_draws_follow_it(top_p):
    logits = torch.randn(5, 12) * 2
    expected = nucleus_logps(logits, top_p)
    mask = nucleus(torch.softmax(logits, -1), torch.full((5,), top_p))
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(row) for row in expected]
    count = 20_000
    tokens, logps = sample(logits[:1].expand(count, 12), torch.ones(count), draws(count), torch.full((count,), top_p))
    for token, logp in expected[0].items():
        drawn = tokens == token
        assert abs(drawn.double().mean() - math.exp(logp)) < 0.02
        assert (logps[drawn] - logp).abs().max() < 1e-5 if drawn.any() else math.exp(logp) < 0.02
    assert set(tokens.tolist()) <= set(expected[0])


def test_each_row_has_its_own_nucleus_and_greedy_ones_report_the_whole_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5]]).expand(3, 4)
    top_p, low = torch.tensor([0.1, 1.0, 0.1]), torch.zeros(3, dtype=torch.float64)
    tokens, logps = sample(logits, torch.tensor([1.0, 1.0, 0.0]), low, top_p)
    assert tokens.tolist() == [2, 0, 2]
    whole = torch.log_softmax(logits[0], -1)
    assert torch.allclose(logps, torch.stack([torch.tensor(0.0), whole[0], whole[2]]))
    equal = nucleus(torch.full((1, 4), 0.25), torch.tensor([0.5]))
    assert equal.tolist() == [[True, True, False, False]]
