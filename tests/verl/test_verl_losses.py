"""The losses registered in verl: values, gradients and metrics of verl's own functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.utils.losses import ppo_loss

from spear_fast.errors import ConfigError
from spear_fast.integrations.verl import LOSSES
from tests.verl.batches import Batch, actor, assert_same, random_batch, run

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
WHOLE = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.9, "kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}
"""Clip-Cov takes all candidates, so that verl's draw is determined."""
NAMES = ("vanilla", "clip_cov", "kl_cov", "gspo", "cispo")
MINI_BATCH = {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 13, "loss_scale_factor": 17}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 5e-8}
"""verl adds 1e-8 to what it divides by."""


def test_verl_loads_the_losses_by_its_own_mechanism() -> None:
    """conftest names the package to verl before its first import; the registry is verl's."""
    assert set(LOSSES) <= set(POLICY_LOSS_REGISTRY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_same_as_verl(name: str, aggregation: str, dtype: torch.dtype) -> None:
    """Against verl in float64, for the whole batch, and as one micro-batch of several ranks with weights."""
    for seed, info, weighted in ((0, None, False), (1, MINI_BATCH, True)):
        batch, config = random_batch(seed, weighted=weighted).to(dtype), actor(info, **WHOLE)
        theirs = run(name, batch.to(torch.float64), aggregation, config)
        ours = run(f"spear_{name}", batch, aggregation, config)
        assert theirs.gradient.count_nonzero() > 5
        assert_same(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize(("ours_c", "theirs_c"), [(1.2, 1.2), (3.0, 3.0), (1e9, 1e9), (None, 1e9)])
def test_dual_clip(ours_c: float | None, theirs_c: float) -> None:
    batch = random_batch(2, spread=1.0)
    ours = run("spear_vanilla", batch, "token-mean", actor(clip_ratio_c=ours_c))
    theirs = run("vanilla", batch, "token-mean", actor(clip_ratio_c=theirs_c))
    assert (theirs.metrics["actor/pg_clipfrac_lower"] > 0) == (theirs_c < 1e9)
    assert_same(ours, theirs, 5e-8)


def test_clip_cov_with_dual_clip_bounds_what_it_does_not_drop() -> None:
    """Dr.BoT's loss, which verl lacks: verl's vanilla on the tokens that verl's clip_cov keeps."""
    batch = random_batch(3, spread=1.0)
    kept = ~_dropped(batch, actor(**WHOLE))
    assert (~kept & batch.response_mask).sum() > 0
    vanilla = run("vanilla", replace(batch, response_mask=batch.response_mask & kept), "token-sum", actor())
    ours = run("spear_clip_cov_dual", batch, "token-sum", actor(**WHOLE))
    assert ours.metrics["actor/pg_clipfrac_lower"] > 0
    torch.testing.assert_close(ours.loss, vanilla.loss)
    torch.testing.assert_close(ours.gradient, vanilla.gradient)


def _dropped(batch: Batch, config: Any) -> torch.Tensor:
    """Clip-Cov's choice of verl, bool [B, T]: where its gradient is 0 and that of the surrogate alone is not."""
    nothing = actor(**{**WHOLE, "clip_cov_lb": 1e6, "clip_cov_ub": 2e6})
    plain = run("clip_cov", batch, "token-sum", nothing).gradient
    return (run("clip_cov", batch, "token-sum", config).gradient == 0) & (plain != 0)


def test_clip_cov_with_one_candidate_drops_that_one() -> None:
    batch, mask = random_batch(4, spread=0.01), random_batch(4).response_mask
    values = (batch.advantages - batch.advantages[mask].mean()) * (batch.log_prob - batch.log_prob[mask].mean())
    first, second = values[mask].topk(2).values.tolist()
    config = actor(clip_cov_ratio=0.0001, clip_cov_lb=(first + second) / 2, clip_cov_ub=first + 1)
    ours, theirs = (run(name, batch, "token-mean", config) for name in ("spear_clip_cov", "clip_cov"))
    assert (ours.gradient[mask] == 0).sum() == 1
    assert_same(ours, theirs, 5e-8)


def test_clip_cov_draws_as_many_of_the_candidates_as_verl_and_not_always_the_same() -> None:
    batch = random_batch(5)
    candidates = _dropped(batch, actor(**WHOLE))
    config = actor(**{**WHOLE, "clip_cov_ratio": 0.1})
    wanted = int(0.1 * batch.response_mask.sum())
    assert 1 < wanted < candidates.sum()
    plain = run("vanilla", batch, "token-sum", actor(clip_ratio_c=1e9)).gradient
    draws = set()
    for _ in range(8):
        ours = run("spear_clip_cov", batch, "token-sum", config)
        chosen = (ours.gradient == 0) & (plain != 0)
        assert chosen.sum() == wanted and not (chosen & ~candidates).any()
        assert ours.metrics == pytest.approx(run("clip_cov", batch, "token-sum", config).metrics)
        draws.add(tuple(chosen.flatten().tolist()))
    assert len(draws) > 1


def test_the_draw_follows_the_seed_of_torch() -> None:
    batch, config = random_batch(6), actor(**{**WHOLE, "clip_cov_ratio": 0.1})
    gradients = []
    for _ in range(2):
        torch.manual_seed(17)
        gradients.append(run("spear_clip_cov", batch, "token-mean", config).gradient)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_masked_places_never_count_and_masks_may_be_numbers(name: str) -> None:
    batch, config = random_batch(7), actor(**WHOLE)
    hole = torch.where(batch.response_mask, 0.0, torch.nan)
    spoiled = Batch(
        batch.old_log_prob + hole, batch.log_prob + hole, batch.advantages + hole, batch.response_mask.float()
    )
    expected = run(f"spear_{name}", batch, "seq-mean-token-mean", config)
    found = run(f"spear_{name}", spoiled, "seq-mean-token-mean", config)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.gradient, expected.gradient)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_action_tokens(name: str, aggregation: str) -> None:
    """0 as in verl where the mini-batch has tokens; alone, 0 where verl divides 0 by 0."""
    batch = random_batch(8)
    empty = replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    for info in (MINI_BATCH, None):
        ours = run(f"spear_{name}", empty, aggregation, actor(info, **WHOLE))
        assert ours.loss == 0 and not ours.gradient.any()
        assert set(ours.metrics.values()) == {0.0}
    assert run(name, empty, aggregation, actor(MINI_BATCH, **WHOLE)).loss == 0


def test_weights_and_advantages_of_sequences_are_broadcast() -> None:
    batch = random_batch(9, weighted=True)
    assert batch.rollout_is_weights is not None
    by_row = replace(batch, advantages=batch.advantages[:, :1], rollout_is_weights=batch.rollout_is_weights[:, :1])
    ours, theirs = (run(name, by_row, "token-mean", actor()) for name in ("spear_vanilla", "vanilla"))
    assert_same(ours, theirs, 5e-8)


def test_a_token_of_weight_0_takes_its_place_in_the_choice_as_in_verl() -> None:
    batch = replace(random_batch(10), rollout_is_weights=torch.zeros(6, 9, dtype=torch.float64))
    ours, theirs = (run(name, batch, "token-mean", actor(**WHOLE)) for name in ("spear_clip_cov", "clip_cov"))
    assert ours.metrics["actor/pg_clipfrac"] > 0
    assert_same(ours, theirs, 5e-8)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_verl_does_not_clamp_the_log_ratio_here_and_we_do(name: str) -> None:
    batch = random_batch(11)
    far = replace(batch, old_log_prob=batch.log_prob - 1000, advantages=-batch.advantages.abs())
    assert not run(name, far, "token-mean", actor(**WHOLE)).loss.isfinite()
    assert run(f"spear_{name}", far, "token-mean", actor(**WHOLE)).loss.isfinite()


def test_gspo_keeps_a_gradient_where_verl_clamps_it_away() -> None:
    batch = random_batch(12)
    far = replace(batch, old_log_prob=batch.log_prob - 11, advantages=-batch.advantages.abs())
    ours, theirs = (run(name, far, "token-mean", actor()) for name in ("spear_gspo", "gspo"))
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert not theirs.gradient.any() and ours.gradient[far.response_mask].all()


def test_bfloat16_log_probs() -> None:
    batch = random_batch(13)
    ours = run("spear_vanilla", batch.to(torch.bfloat16), "token-mean", actor())
    theirs = run("vanilla", batch.to(torch.bfloat16).to(torch.float64), "token-mean", actor())
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-2, atol=1e-4)


def padded_batch() -> TensorDict:
    """Two prompts of five tokens with two and three response tokens, as verl hands a micro-batch to its loss."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    numbers = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    tensors = {
        "prompts": torch.full((2, 5), 7),
        "responses": torch.full((2, 3), 7),
        "attention_mask": torch.cat([torch.ones(2, 5, dtype=torch.bool), mask], 1),
        "response_mask": mask,
        "old_log_probs": numbers - 2,
        "advantages": numbers,
    }
    data = TensorDict(tensors, batch_size=2)
    for name, count in (("dp_size", 1), ("batch_num_tokens", 9), ("global_batch_size", 4)):
        data.set_non_tensor(name, count)
    return data


@pytest.mark.parametrize("name", NAMES)
def test_inside_verls_ppo_loss(name: str) -> None:
    """verl's own caller pads, aggregates and changes the loss in place for its entropy term."""
    results = []
    for mode in (name, f"spear_{name}"):
        values = torch.linspace(-2, -0.1, 15, dtype=torch.float64).requires_grad_()  # of all tokens, prompts included
        config = actor(loss_mode=mode, entropy_coeff=0.1, **WHOLE)
        loss, metrics = ppo_loss(config, {"log_probs": values, "entropy": values.square()}, padded_batch())
        numbers = {key: metric.aggregate() for key, metric in metrics.items()}
        results.append((loss.detach(), torch.autograd.grad(loss, values)[0], numbers))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("name", "mode", "info", "settings", "field"),
    [
        ("spear_vanilla", "token-mean", None, {"clip_ratio_c": 0.5}, "clip_ratio_c"),
        ("spear_vanilla", "token-avg", None, {}, "token-avg"),
        ("spear_clip_cov", "token-mean", None, {"clip_cov_ratio": 0}, "clip_cov_ratio=0"),
        ("spear_clip_cov", "token-mean", None, {"clip_cov_lb": 9.0}, "cov_lower=9.0"),
        ("spear_kl_cov", "token-mean", None, {"kl_cov_ratio": -1}, "kl_cov_ratio=-1"),
        ("spear_vanilla", "token-mean", {"dp_size": 2}, {}, "batch_num_tokens"),
        ("spear_vanilla", "seq-mean-token-sum", {"dp_size": 2}, {}, "global_batch_size"),
        ("spear_vanilla", "token-mean", {"scale": 2}, {}, "scale"),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, mode: str, info: Any, settings: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        run(name, random_batch(14), mode, actor(info, **settings))


def test_what_is_missing_is_named() -> None:
    batch = random_batch(15)
    with pytest.raises(ConfigError, match="actor configuration"):
        get_policy_loss_fn("spear_vanilla")(**vars(batch))
