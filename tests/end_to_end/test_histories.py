"""Whole runs in which a trajectory is several rows: what is trained is what was sampled, in both rollout modes."""

from __future__ import annotations

import pytest

from tests.end_to_end.test_training import config_of, run

GAME = [
    "task.name=treasure",
    "task.params={num_rooms: 3, with_key: false, max_steps: 5, num_train: 64, num_eval: 4, num_demo: 24}",
    "model.init.vocab_size=400",
    "model.init.max_positions=320",
    "cold_start={steps: 50, num_demos: 24, batch_size: 32, lr: 0.01}",
    "rollout={prompts_per_step: 2, group_size: 4, max_turns: 5, max_turn_tokens: 24, max_tokens: 320, window: 1}",
    "rollout.history=windowed",
    "algo.preset=spear_gigpo",
    "algo.filters={overlong: false, incomplete: false, repetitive: false, unreadable: false, keep_groups: 1.0}",
    "algo.replay={buffer_size: 4, ripe_factor: 0.1, require_tool_call: false, warmup_steps: 1, recalibrate: none}",
    "update={lr: 0.001, mini_batch_size: 8, token_budget: 2048, old_logp: sampler}",
    "eval.num_tasks=4",
]


@pytest.mark.parametrize("mode", ["sync", "partial"])
def test_a_windowed_run_trains_on_what_was_sampled(tmp_path, mode):
    overrides = [*GAME, f"rollout.mode={mode}", f"rollout.deterministic={str(mode == 'sync').lower()}"]
    lines, _ = run(config_of(tmp_path, "steps=2", *overrides))
    steps = [line for line in lines if "reward/mean" in line]
    assert all(line["rollout/rows_mean"] == line["rollout/turns_mean"] > 1.5 for line in steps)
    assert all(line["update/logp_gap_nats"] < 1e-4 for line in steps), "a row is not what the policy was fed"
    assert all(line["update/optimizer_steps"] > 1 for line in steps), "mini-batches hold rows"
    assert sum(line["replay/drawn"] for line in steps) > 0
    assert "eval/success/treasure" in lines[-1] and "reward/success/treasure" in steps[0]
