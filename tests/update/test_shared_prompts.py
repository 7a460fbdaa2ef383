"""A prompt computed once for all that follows it: same log-probs, loss and gradients as computed for each."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm

from spear_fast.batching import collate
from spear_fast.errors import ConfigError
from spear_fast.types import Row, Segments
from spear_fast.update import model as model_module
from spear_fast.update.model import probe_isolation
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.scoring import Scorer, fresh_gap
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig

ONE_BATCH, MANY_BATCHES = 10_000, 40
KINDS = ("ppo", "clip_cov", "gspo")
GROUPS = [
    (13, [[6], [2, 5, 4], [1], [1], [3, 1, 1, 2, 9]]),
    (13, [[7], [4, 2, 3]]),
    (20, [[5, 3, 2]]),
    (1, [[3], [2, 2, 2], [1]]),
    (34, [[9], [8, 2, 1], [7]]),
]
"""(prompt length, lengths of sampled and observed spans of each row): singletons, rows of one token, several turns, two
prompts of one length, and groups that do not fit the small budget together."""


def make_rows(groups=GROUPS, seed=0, vocab_size=64) -> list[Row]:
    """Rows in a shuffled order, of group ids that do not tell which rows belong together."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt_length, members in groups:
        prompt = generator.integers(0, vocab_size, prompt_length)
        for spans in members:
            turns = [np.full(length, turn % 2 == 0) for turn, length in enumerate(spans)]
            mask = np.concatenate([np.zeros(prompt_length, dtype=bool), *turns])
            tokens = np.concatenate([prompt, generator.integers(0, vocab_size, sum(spans))]).astype(np.int32)
            value = np.where(mask, generator.normal(size=len(mask)), 0).astype(np.float32)
            rows.append(Row(100 + 7 * len(rows), len(rows) % 3, len(rows), tokens, mask, value - 3, value.copy()))
    return [rows[i] for i in generator.permutation(len(rows))]


def in_float64(policy):
    """The policy in float64 throughout: Qwen2's norm goes through float32, where rounding would hide errors."""
    policy.model.double()
    for module in policy.model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.forward = partial(
                rms_norm, normalized_shape=(32,), weight=module.weight, eps=module.variance_epsilon
            )
    return policy


@pytest.mark.parametrize("budget", [ONE_BATCH, MANY_BATCHES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_loss_and_gradients_of_all_parameters(new_policy, kind, budget, tie):
    policy = in_float64(new_policy(tie=tie))
    rows = make_rows(seed=KINDS.index(kind))
    for row, logp in zip(rows, Scorer(policy, ONE_BATCH).score(rows), strict=True):
        row.old_logp = logp + np.random.default_rng(row.uid).normal(0, 0.2, len(logp)).astype(np.float32)
    cfg = PolicyLossConfig(kind=kind, clip_high=0.28, cov_ratio=0.2, cov_lower=0.5, cov_upper=6.0)
    results = []
    for share in (False, True):
        updater = Updater(policy, OptimizerSettings(lr=1e-3, grad_clip=1e9), token_budget=budget, share_prompts=share)
        grads: dict[str, torch.Tensor] = {}
        updater.optimizer.step = lambda grads=grads: grads.update(
            {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}
        )
        results.append((grads, updater.optimizer_step([LossGroup(rows, cfg)], seed=5)))
    (plain, plain_metrics), (shared, shared_metrics) = results
    assert (shared_metrics["update/micro_batches"] < plain_metrics["update/micro_batches"]) == (budget == MANY_BATCHES)
    assert shared_metrics["update/loss"] == pytest.approx(plain_metrics["update/loss"], rel=1e-6)
    for name, grad in plain.items():
        gap = (shared[name] - grad).norm() / grad.norm()
        assert gap < 1e-9, f"{name}: {gap}"


@pytest.mark.parametrize("budget", [ONE_BATCH, MANY_BATCHES])
def test_log_probs_in_float32(policy, budget):
    rows = make_rows(seed=9)
    plain, shared = (Scorer(policy, budget, share_prompts=share).score(rows) for share in (False, True))
    for one, other in zip(plain, shared, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
    assert Scorer(policy, budget, share_prompts=True).share(rows) != Scorer(policy, budget).share(rows) or budget > 1000


SPANS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.integers(1, 6), st.lists(SPANS, min_size=1, max_size=4)), min_size=1, max_size=5))
@settings(max_examples=40)
def test_layout_token_by_token(groups):
    # A vocabulary of two: equal prompts of different groups and prompts that begin alike do occur.
    rows = make_rows(groups, seed=len(groups), vocab_size=2)
    batch = collate(rows, range(len(rows)), "cpu", share_prompts=True)
    tokens, places = batch.input_ids.tolist(), batch.position_ids.tolist()
    segments, packed = batch.segments, []
    for start, length, prefix in zip(segments.start, segments.length, segments.prefix, strict=True):
        before = range(segments.start[prefix], segments.start[prefix] + segments.length[prefix]) if prefix >= 0 else ()
        packed.append([*before, *range(start, start + length)])
        assert [places[p] for p in packed[-1]] == list(range(len(packed[-1])))
    prompts = set(segments.prefix.tolist()) - {-1}
    sequences = sorted([tokens[p] for p in packed[s]] for s in range(len(packed)) if s not in prompts)
    assert sequences == sorted(row.tokens.tolist() for row in rows)
    # In the order of the rows, so that nothing else than `predictors` knows of the layout.
    actions = [(row, t) for row in rows for t in np.flatnonzero(row.action_mask)]
    assert batch.targets.tolist() == [row.tokens[t] for row, t in actions]
    assert batch.seq_ids.tolist() == [row.uid for row, _ in actions]
    assert batch.versions.tolist() == [row.version for row, _ in actions]
    for place, (row, t) in zip(batch.predictors.tolist(), actions, strict=True):
        before = row.tokens[:t].tolist()
        assert any(whole[t - 1 : t] == [place] and [tokens[p] for p in whole[:t]] == before for whole in packed)
    distinct = {row.tokens[: np.argmax(row.action_mask)].tobytes() for row in rows}
    heads = sum(len(head) // 4 for head in distinct)
    assert len(tokens) == heads + sum(row.num_tokens - int(np.argmax(row.action_mask)) for row in rows)


def test_example_of_the_docstring():
    rows = make_rows([(2, [[2], [1]])])
    rows.sort(key=lambda row: -row.num_tokens)
    batch = collate(rows, [0, 1], "cpu", share_prompts=True)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert (batch.segments.length.tolist(), batch.segments.prefix.tolist()) == ([2, 2, 1], [-1, 0, 0])
    assert batch.predictors.tolist() == [1, 2, 1]
    ((shared_rows, shared_places),) = batch.repeats
    assert (shared_rows.tolist(), shared_places.tolist()) == ([1], [[0, 2]])


def test_gap_of_rows_sampled_whole_by_one_version():
    rows = make_rows(seed=4)
    for row in rows:
        row.version = row.uid % 4
    logp = [np.random.default_rng(row.uid).normal(size=row.num_tokens).astype(np.float32) for row in rows]
    parts = [range(5), range(5, len(rows))]
    found, weights = [], []
    for index in parts:
        values = np.concatenate([logp[i][rows[i].action_mask] for i in index])
        found.append(fresh_gap(torch.from_numpy(values), collate(rows, index, "cpu", share_prompts=True), 2))
        weights.append(len(values))
    gap, fraction = (np.average([part[name].item() for part in found], weights=weights) for name in found[0])
    fresh = [np.abs(logp[i] - row.old_logp)[row.action_mask] for i, row in enumerate(rows) if row.version >= 2]
    assert 0 < len(fresh) < len(rows)
    assert gap / fraction == pytest.approx(np.concatenate(fresh).mean(), rel=1e-5)
    assert fraction * sum(weights) == pytest.approx(sum(map(len, fresh)), rel=1e-5)


def test_probe_refuses_a_back_end_that_shows_one_rest_to_another(policy, monkeypatch):
    plan = model_module.plan_attention

    def chained(segments, *rest):
        if segments.shared:
            joined = [segments.length[0], segments.length[1:].sum()]
            segments = Segments.of(joined, [-1, 0])
        return plan(segments, *rest)

    monkeypatch.setattr(model_module, "plan_attention", chained)
    with pytest.raises(ConfigError, match="gives other logits packed than alone"):
        probe_isolation(policy)
