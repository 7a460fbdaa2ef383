"""SPEARTrainer in real runs of TRL: losses shared with TRL, replay and its loss, rewards, filters, resume, tools."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from spear_fast.errors import CheckpointError, ConfigError
from spear_fast.integrations.trl import SPEARConfig, SPEARTrainer
from spear_fast.integrations.trl.batches import replay_batches
from spear_fast.integrations.trl.rollouts import runs
from spear_fast.types import Group, Row, Task, Trajectory, Turn
from tests.integrations.trl_toys import (
    NO_TOOLS,
    RUN,
    batch,
    history,
    named,
    prompts,
    scripted_rollouts,
    settings,
    spear,
    tiny_model,
    tiny_tokenizer,
    word_reward,
)

EPS = (0.2, 0.28, 10.0)


def gradients_of_step(trainer: Any, parts: list[dict[str, Any]], first: int = 0) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of the optimizer step whose micro-batches are `parts`, the first being TRL's `first`."""
    trainer.model.zero_grad()
    trainer._buffered_inputs, total = [copy.copy(part) for part in parts], 0.0
    for index, inputs in enumerate(trainer._buffered_inputs):
        trainer._step = first + index
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, flat_gradient(trainer.model)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}),
    "dapo": ({"loss_type": "dapo"}, {}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"policy_loss": "gspo"}),
    "entropy": ({"loss_type": "dapo", "entropy_coef": 0.5}, {}),
    "no_old_logp": ({"loss_type": "dapo"}, {}),
    "kl": ({"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False}, {}),
}


@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_a_step_are_those_of_trl(name: str, tmp_path: Path) -> None:
    common, ours = SHARED[name]
    steps = 1 if name == "entropy" else 2
    common = {**common, "gradient_accumulation_steps": steps, "epsilon_high": 0.28}
    model = tiny_model(tie_word_embeddings=False)
    model.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path)
    parts = [named(batch(seed=i, tools=True), 4 * i) for i in range(steps)]
    total = sum((part["completion_mask"] * part["tool_mask"]).sum() for part in parts)
    for part in parts:
        part["num_items_in_batch"] = total
        if name == "no_old_logp":
            del part["old_per_token_logps"]
    args = GRPOConfig(**settings(tmp_path, scale_rewards="none", **common))
    stock = GRPOTrainer(
        copy.deepcopy(model), word_reward, args=args, train_dataset=prompts(), processing_class=tiny_tokenizer()
    )
    stock.current_gradient_accumulation_steps = steps
    stock.model.train()
    own = {key: value for key, value in common.items() if key != "importance_sampling_level"}
    trainer = spear(tmp_path, model, False, **NO_TOOLS, **own, **{"policy_loss": "ppo", **ours}, dual_clip=None)
    expected, gradient = gradients_of_step(stock, parts)
    value, found = gradients_of_step(trainer, parts)
    assert value == pytest.approx(expected, rel=2e-5, abs=2e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert trainer._metrics["train"]["entropy"][0] > 1.0


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_the_covariance_choice_does_not_depend_on_micro_batches(loss: str, tmp_path: Path) -> None:
    options = {"policy_loss": loss, "cov_ratio": 0.3, "cov_lower": -50.0, "loss_type": "dapo", **NO_TOOLS}
    whole = named(batch(seed=7, rows=8), 0)
    found, model = {}, tiny_model()
    for size, stats in ((8, "minibatch"), (4, "minibatch"), (2, "minibatch"), (2, "microbatch")):
        parts = [
            {k: v if v.ndim == 0 else v[i : i + size] for k, v in whole.items()}
            for i in range(0, len(whole["advantages"]), size)
        ]
        trainer = spear(
            tmp_path, copy.deepcopy(model), False, **options, cov_stats=stats,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, num_iterations=2,
        )  # fmt: skip
        # The second pass over a generation, where old log-probs are not those of the present weights.
        found[size, stats] = gradients_of_step(trainer, parts, first=8 // size)[1]
        assert trainer._metrics["train"]["spear/loss/selected_fraction"][0] > 0.1
    reference = found[8, "minibatch"]
    for size in (4, 2):
        torch.testing.assert_close(found[size, "minibatch"], reference, rtol=1e-4, atol=1e-6)
    assert (found[2, "microbatch"] - reference).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["ppo", "gspo", "clip_cov"])
def test_a_micro_batch_without_action_tokens_touches_every_weight(loss: str, tmp_path: Path) -> None:
    empty = named(batch(seed=1), 4)
    empty["completion_mask"] = torch.zeros_like(empty["completion_mask"])
    parts = [named(batch(seed=0), 0), empty]
    for part in parts:
        del part["old_per_token_logps"]
    trainer = spear(tmp_path, tools=False, policy_loss=loss, **NO_TOOLS)
    trainer._buffered_inputs = parts
    trainer._step = 0
    trainer._compute_loss(trainer.model, parts[0])
    trainer._step = 1
    value = trainer._compute_loss(trainer.model, parts[1])
    value.backward()
    assert value.item() == 0.0
    # DistributedDataParallel waits for a gradient of each.
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def past_rounds(count: int) -> tuple[list[Group], list[Row]]:
    """Groups of round 0 with rewards 3 and 1, and a row for each trajectory; token 0 of a row is its prompt."""
    generator = np.random.default_rng(1)
    groups, rows = [], []
    for group in range(count):
        members = []
        for sample, value in enumerate((3.0, 1.0)):
            uid = 2 * group + sample
            trajectory = Trajectory(Task("trl", "train", group, seed=0), group, sample, uid=uid, version=0)
            trajectory.reward, trajectory.num_valid_tool_calls, trajectory.turns = value, 1, [Turn(0, 1)]
            length = int(generator.integers(4, 8))
            mask = generator.random(length) < 0.7
            mask[0], mask[-1] = False, True
            advantages = np.where(mask, value - 2.0, 0.0).astype(np.float32)
            tokens = generator.integers(3, 290, length).astype(np.int32)
            old_logp = generator.normal(-5.5, 0.5, length).astype(np.float32)
            weight = generator.uniform(0.5, 1.5, length).astype(np.float32)
            rows.append(Row(uid, group, 0, tokens, mask, old_logp, advantages, reward=value, weight=weight))
            members.append(trajectory)
        groups.append(Group(group, members[0].task, members))
    return groups, rows


def reference_sil(model: torch.nn.Module, rows: list[Row], advantage: float, weight: float, norm: int) -> torch.Tensor:
    """weight * the clipped surrogate of arXiv 2509.22601 over one optimizer step, written out in float64."""
    low, high, dual = EPS
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()[None]
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in np.flatnonzero(row.action_mask):
            ratio = (logp[place - 1, ids[0, place]] - float(row.old_logp[place])).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
            loss = loss if advantage > 0 else loss.clamp(max=-advantage * dual)
            total = total + (loss if row.weight is None else loss * float(row.weight[place]))
    return weight * total / (len(rows) * norm)


def test_the_replay_loss_is_a_float64_loop_over_good_rows(tmp_path: Path) -> None:
    trainer = spear(
        tmp_path, replay_buffer_size=6, replay_ripe_factor=0.5, replay_warmup_steps=4, replay_coef=0.7,
        replay_cov_ratio=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.0,
    )  # fmt: skip
    groups, rows = past_rounds(5)
    taken: list[torch.Tensor] = []
    trainer.optimizer = SimpleNamespace(step=lambda: taken.append(flat_gradient(trainer.model)))  # type: ignore[assignment]
    imitation = trainer._imitation
    assert imitation is not None
    assert imitation.memory.offer(groups, rows)["replay/admitted"] == 5
    stats = imitation.separate_steps(1)
    assert stats["replay/drawn"] == 5 and stats["sil/optimizer_steps"] == 1
    reference = copy.deepcopy(tiny_model()).double()
    gamma = (1 - math.cos(math.pi * 1 / 4)) / 2
    # R = 3, the median of the groups' means is 2.
    loss = reference_sil(reference, rows[::2], 3.0 - 2.0, 0.7 * gamma, norm=8)
    loss.backward()
    assert stats["sil/loss"] * stats["sil/weight"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(taken[0], flat_gradient(reference), rtol=1e-3, atol=1e-7)
    assert imitation.separate_steps(2)["replay/drawn"] == 0


@pytest.mark.parametrize("options", [{"replay_mode": "separate_step"}, {"replay_mode": "joint"},
                                     {"replay_mode": "joint", "policy_loss": "trl", "loss_type": "dapo"}])  # fmt: skip
def test_a_run_replays_and_pays_for_tools(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = spear(tmp_path, **{**RUN, **options}, intrinsic_decay_steps=4)
    trainer.train()
    without = spear(tmp_path, **{**RUN, **options, "replay_mode": "off"}, intrinsic_decay_steps=4)
    without.train()
    drawn = history(trainer, "spear/replay/drawn")
    assert len(drawn) == 5 and drawn[0] == 0 and sum(drawn) >= 2
    assert all(math.isfinite(value) and value != 0 for value in history(trainer, "spear/sil/loss"))
    assert any(value > 0 for value in history(trainer, "spear/sil/weight"))
    assert any(
        not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), without.model.parameters(), strict=True)
    )
    # Of 8 rows 3 call no tool, 3 call one, 2 call two.
    mu = [(math.cos(math.pi * step / 4) + 1) / 2 for step in range(5)]
    paid = [value * (3 * 0.1 + 2 * 0.2) / 8 for value in mu]
    assert history(trainer, "rewards/spear_tool_reward/mean") == pytest.approx(paid, abs=1e-6)
    outcome, total = history(trainer, "rewards/word_reward/mean"), history(trainer, "reward")
    assert total == pytest.approx([a + b for a, b in zip(outcome, paid, strict=True)], abs=1e-5)
    evaluation = trainer.evaluate(prompts().select(range(4)))
    assert evaluation["eval_rewards/spear_tool_reward/mean"] == 0.0
    assert evaluation["eval_reward"] == pytest.approx(evaluation["eval_rewards/word_reward/mean"])


def test_resume_restores_round_and_memory(tmp_path: Path) -> None:
    options = {**RUN, "replay_mode": "separate_step", "replay_ripe_factor": 2.5}
    whole = spear(tmp_path / "whole", **options)
    whole.train()
    first = spear(tmp_path / "cut", **options, save_strategy="steps", save_steps=2)
    first.train()
    again = spear(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert history(whole, "spear/replay/drawn")[:2] == [0, 0] and sum(history(whole, "spear/replay/drawn")) > 0
    for name in ("spear/reward/mu", "spear/replay/size", "spear/replay/drawn", "spear/sil/loss"):
        assert history(again, name)[-3:] == pytest.approx(history(whole, name)[-3:], rel=1e-5), name
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    (tmp_path / "cut" / "checkpoint-2" / "spear_state.npz").unlink()
    with pytest.raises(CheckpointError, match=r"has no spear_state\.npz; resume from a checkpoint of SPEARTrainer"):
        spear(tmp_path / "cut", **options).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))


def test_filters_and_the_group_filter_leave_the_loss(tmp_path: Path) -> None:
    trainer = spear(tmp_path, keep_groups=0.5, repetition_ngram=2, repetition_max_repeats=3, filter_unreadable=True)
    original = scripted_rollouts

    def repeating(rows: list[Any], trainer: Any) -> dict[str, Any]:
        output = original(rows, trainer)
        # Letters decode; the second group has the larger spread; its first sample repeats, its second does not decode.
        output["completion_ids"] = [[40 + i, 41, 42, 43, 44, 45] for i in range(8)]
        output["completion_ids"][4] = [50, 50, 50, 50, 50, 50]
        output["completion_ids"][5] = [255, 41, 42, 43, 44, 45]
        output["env_mask"] = [[1] * 6] * 8
        return output

    trainer.rollout_func = repeating
    trainer.reward_funcs[0] = lambda completions, **_: [0.0] * 4 + [0.0, 5.0, 0.0, 5.0]
    assert "\ufffd" in trainer._tokenizer.decode([255]) and "\ufffd" not in trainer._tokenizer.decode(range(40, 52))
    output = trainer._generate_and_score_completions([{"prompt": "a"}] * 8)
    assert output["tool_mask"].any(1).tolist() == [False] * 4 + [False, False, True, True]
    assert output["num_items_in_batch"] == 12
    metrics = trainer._metrics["train"]
    assert metrics["spear/filter/repetitive_frac"] == metrics["spear/filter/unreadable_frac"] == [1 / 8]


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: One.
        b: Other.

    Returns:
        The sum.
    """
    if a > 5:
        raise ValueError("too large")
    return a + b


def test_tool_calls_of_trls_own_loop_are_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = qwen2_5_chat_template
    args = SPEARConfig(
        **settings(tmp_path, max_completion_length=256, gradient_accumulation_steps=1, filter_unreadable=False)
    )
    trainer = SPEARTrainer(
        tiny_model(max_position_embeddings=2048),
        word_reward,
        args,
        train_dataset=prompts(),
        processing_class=tokenizer,
        tools=[add],
    )
    calls = ["plain"] + [
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": {a}, "b": 1}}}}\n</tool_call>'
        for name, a in (("add", 1), ("add", 9), ("sub", 1))
    ]
    scripts = iter([calls, ["done"] * 3])

    def speak(prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return [tokenizer.encode(text + "<|im_end|>") for text in next(scripts)], None

    trainer._generate_single_turn = speak
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": "hi"}]}] * 4)
    (group,) = trainer._groups
    assert [t.num_tool_calls for t in group.trajectories] == [0, 1, 1, 1]
    assert [t.num_valid_tool_calls for t in group.trajectories] == [0, 1, 0, 0]
    assert [len(t.turns) for t in group.trajectories] == [1, 2, 2, 2]
    assert [t.intrinsic_reward for t in group.trajectories] == [0, 0.1, 0.1, 0.1]
    assert output["spear_uid"].tolist() == [0, 1, 2, 3]


def test_a_rank_without_rows_keeps_step() -> None:
    _, rows = past_rounds(3)
    shares = [replay_batches(rows[:5], 2, rank, 2, pad_id=0, device=torch.device("cpu")) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    labelled = [int(part.mask.any(1).sum()) for share in shares for part in share]
    assert labelled == [2, 1, 2, 0]
    assert sum(int(part.counts()[0]) for share in shares for part in share) == sum(
        r.num_action_tokens for r in rows[:5]
    )


def test_runs() -> None:
    assert runs([1, 0, 0, 1], 0) == [(1, 3)] and runs([1, 0, 0, 1], 1) == [(0, 1), (3, 4)] and runs([], 1) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"policy_loss": "ppoo"}, "policy_loss='ppoo' is unknown; choose one of clip_cov, kl_cov"),
    ({"loss_type": "bnpo"}, "loss_type='bnpo' has no meaning with policy_loss='clip_cov'; use grpo, dr_grpo, dapo"),
    ({"delta": 2.0}, "delta=2.0 has no meaning .* use dual_clip, or set policy_loss='trl'"),
    ({"importance_sampling_level": "sequence"}, "use policy_loss='gspo'"),
    ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 has no meaning"),
    ({"steps_per_generation": 3}, "steps_per_generation=3 must be a multiple of gradient_accumulation_steps=2"),
    ({"cov_lower": 50.0}, "cov_lower=50.0 must be below cov_upper=40.0"),
    ({"dual_clip": 0.5}, "dual_clip=0.5 must be > 1"),
    ({"keep_groups": 0.0}, "keep_groups=0.0 must be above 0"),
    ({"replay_buffer_size": 0}, "replay_buffer_size=0 must be above 0"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        SPEARConfig(**settings(tmp_path, **{"generation_batch_size": None, "num_generations": 4, **options}))


def test_trainers_without_tools_or_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replay_require_tool_call=True .* or set it False"):
        spear(tmp_path, tools=False, intrinsic_mode="none")
    with pytest.raises(ConfigError, match="intrinsic_mode='cosine' rewards tool calls"):
        spear(tmp_path, tools=False)
    with pytest.raises(ConfigError, match="args=GRPOConfig must be a SPEARConfig"):
        SPEARTrainer(tiny_model(), word_reward, GRPOConfig(**settings(tmp_path)), train_dataset=prompts())
