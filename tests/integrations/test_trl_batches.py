"""TokenBatch and the step's plan: names, importance weights, dropout, denominators; runs under other options of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer

from spear_fast.integrations.trl import SPEARConfig, SPEARTrainer
from spear_fast.integrations.trl.batches import from_inputs, from_rows, to_rows
from spear_fast.integrations.trl.loss import plan_step
from tests.integrations.trl_toys import (
    NO_TOOLS,
    RUN,
    batch,
    history,
    named,
    prompts,
    settings,
    spear,
    tiny_model,
    tiny_tokenizer,
    word_reward,
)


def test_names_of_tokens_do_not_depend_on_padding() -> None:
    inputs = named(batch(seed=3, tools=True), 0)
    longer = inputs | {name: pad(inputs[name], (3, 0)) for name in ("prompt_ids", "prompt_mask")}
    near, far = from_inputs(inputs), from_inputs(longer)
    expected = [place for count in near.mask.sum(1).tolist() for place in range(count)]
    assert near.tokens(near.positions).tolist() == far.tokens(far.positions).tolist() == expected


@pytest.mark.parametrize("width", [1, 7])
def test_importance_weights_are_stored_with_a_trajectory(width: int) -> None:
    inputs = named(batch(seed=4, tools=True), 10)
    inputs["advantages"] = inputs["advantages"].abs() + 0.1
    ratio = torch.rand(4, width, generator=torch.Generator().manual_seed(1)) + 0.1
    ratio[1] = 0.0
    inputs["importance_sampling_ratio"] = ratio
    given = from_inputs(inputs)
    rows = to_rows(inputs, dict.fromkeys(range(10, 14), 1.0), 0, 4)
    assert [row.uid for row in rows] == [10, 12, 13]
    assert all((row.weight[~row.action_mask] == 1).all() for row in rows if row.weight is not None)
    back = from_rows(rows, rows[0], 5, pad_id=0, device=torch.device("cpu"))
    kept = given.tokens(given.uid) != 11
    torch.testing.assert_close(back.tokens(back.weights), given.tokens(given.weights)[kept], rtol=0, atol=0)
    del inputs["importance_sampling_ratio"]
    assert (
        from_rows(
            to_rows(inputs, dict.fromkeys(range(10, 14), 1.0), 0, 4), rows[0], 4, 0, torch.device("cpu")
        ).row_weight
        is None
    )


def plan(trainer: SPEARTrainer, parts: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    batches = [from_inputs(part) for part in parts]
    made = plan_step(trainer.model, batches, trainer._on_policy, "minibatch", trainer.accelerator, 1.0, seed=5)
    return made, batches


COV = {"policy_loss": "clip_cov", "cov_ratio": 0.5, "cov_lower": -50.0, **NO_TOOLS}


def test_tokens_of_weight_0_are_never_chosen(tmp_path: Path) -> None:
    parts = [named(batch(seed=index), 4 * index) for index in range(2)]
    generator = torch.Generator().manual_seed(2)
    for part in parts:
        del part["old_per_token_logps"]
        part["importance_sampling_ratio"] = (torch.rand(4, 7, generator=generator) > 0.4).float()
    made, batches = plan(spear(tmp_path, tools=False, **COV), parts)
    chosen = torch.cat([b.tokens(s) for b, s in zip(batches, made.selected, strict=True)])
    weights = torch.cat([b.tokens(b.weights) for b in batches])
    assert chosen.sum() == len(chosen) // 2 and not chosen[weights == 0].any()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_leaves_ratios_at_1(rate: float, tmp_path: Path) -> None:
    trainer = spear(tmp_path, tiny_model(attention_dropout=rate), tools=False, **COV)
    parts = [named(batch(seed=index), 4 * index) for index in range(2)]
    for part in parts:
        del part["old_per_token_logps"]
    made, batches = plan(trainer, parts)
    assert made.selected is not None and any(part.any() for part in made.selected)
    assert all((b.old_logp is None) == (rate > 0) for b in batches)
    trainer._buffered_inputs = parts
    for index, part in enumerate(parts):
        trainer._step = index
        trainer._compute_loss(trainer.model, part)
    metrics = trainer._metrics["train"]
    assert metrics["spear/loss/clip_fraction"] == [0.0] and metrics["spear/loss/selected_fraction"][0] > 0.3


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_averages_over_sequences_leave_out_rows_without_action_tokens(loss_type: str, tmp_path: Path) -> None:
    common = {"loss_type": loss_type, "gradient_accumulation_steps": 1, "epsilon_high": 0.28}
    inputs = named(batch(seed=6), 0)
    inputs["completion_mask"][2] = 0
    values = []
    stock = GRPOTrainer(
        tiny_model(), word_reward, args=GRPOConfig(**settings(tmp_path, scale_rewards="none", **common)),
        train_dataset=prompts(), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    for trainer in (stock, spear(tmp_path, tools=False, **NO_TOOLS, **common, policy_loss="ppo", dual_clip=None)):
        trainer.current_gradient_accumulation_steps, trainer._step = 1, 0
        trainer._buffered_inputs = [inputs]
        trainer.model.train()
        values.append(trainer._compute_loss(trainer.model, inputs).item())
    assert abs(values[0]) > 1e-3 and values[1] == pytest.approx(values[0] * 4 / 3, rel=1e-4)


def test_the_callers_reward_lists_stay_as_they_are(tmp_path: Path) -> None:
    rewards, classes = [word_reward], [None]
    trainer = SPEARTrainer(
        tiny_model(), rewards, SPEARConfig(**settings(tmp_path, replay_mode="off", intrinsic_count="turns")),
        train_dataset=prompts(), processing_class=tiny_tokenizer(), reward_processing_classes=classes,
    )  # fmt: skip
    assert rewards == [word_reward] and classes == [None]
    assert len(trainer.reward_funcs) == len(trainer.reward_processing_classes) == len(trainer.reward_weights) == 2


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False)


@pytest.mark.parametrize("name", ["checkpointed_bfloat16", "lora"])
def test_replay_under_other_options(name: str, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "bf16": True} if name != "lora" else {"peft_config": lora()}
    trainer = spear(tmp_path, **{**RUN, "max_steps": 3}, **options)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert sum(history(trainer, "spear/replay/drawn")) > 0
    assert all(np.isfinite(value) and value != 0 for value in history(trainer, "spear/sil/loss"))
    assert any(value > 0 for value in history(trainer, "spear/sil/grad_norm"))
    changed = [not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start, strict=True)]
    trained = [p.requires_grad for p in trainer.model.parameters()]
    assert changed == trained
