"""LogProbMixin against TRL's own path: equal losses, gradients and metrics, and fewer rows in the head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import spear_kernels.modules.head as head_module
from spear_fast.errors import ConfigError
from spear_fast.integrations.trl import LogProbMixin, patch_trainer
from tests.integrations.trl_toys import batch, prompts, settings, tiny_model, tiny_tokenizer


class OurTrainer(LogProbMixin, GRPOTrainer):
    pass


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, which TRL loads its reference model from."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def trainer_of(kind: type, saved: Path, folder: Path, model: Any = None, **options: Any) -> Any:
    config = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    peft = options.pop("peft_config", None)
    args = config(**settings(folder, **options))
    model = tiny_model(tie_word_embeddings=False) if model is None else model
    model.config._name_or_path = str(saved)
    made = kind(
        model,
        reward,
        args=args,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        peft_config=peft,
    )
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    made.model.train()
    return made


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_same(stock: Any, ours: Any, inputs: dict[str, Any]) -> None:
    expected, gradients = loss_and_gradients(stock, inputs)
    value, found = loss_and_gradients(ours, inputs)
    assert value == pytest.approx(expected, rel=2e-5, abs=2e-6)
    assert gradients.keys() == found.keys()
    assert max(g.abs().max() for g in gradients.values()) > 1e-4
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    for name, values in stock._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "delta": {"loss_type": "grpo", "delta": 1.3},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.5},
    "top_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_are_those_of_trl(name: str, tools: bool, saved: Path, tmp_path: Path) -> None:
    options = {"temperature": 1.0, **CASES[name]}
    stock = trainer_of(GRPOTrainer, saved, tmp_path, **options)
    ours = trainer_of(OurTrainer, saved, tmp_path, **options)
    assert_same(stock, ours, batch(seed=len(name), tools=tools))


def test_kl_to_the_reference_is_that_of_trl(saved: Path, tmp_path: Path) -> None:
    inputs = batch(seed=5, tools=True)
    stock = trainer_of(GRPOTrainer, saved, tmp_path, loss_type="grpo", beta=0.3)
    ours = trainer_of(OurTrainer, saved, tmp_path, loss_type="grpo", beta=0.3)
    assert_same(stock, ours, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        rows = [
            t._get_per_token_logps_and_entropies(t.ref_model, ids, attention, 7, batch_size=3)[0] for t in (stock, ours)
        ]
    torch.testing.assert_close(rows[1], rows[0])


def test_adapters_get_the_gradients_of_trl(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    made = [trainer_of(kind, saved, tmp_path, peft_config=lora, loss_type="dapo") for kind in (GRPOTrainer, OurTrainer)]
    made[1].model.load_state_dict(made[0].model.state_dict())
    assert_same(made[0], made[1], batch(seed=8))


def test_tied_head_in_float32_of_a_bfloat16_model(saved: Path, tmp_path: Path) -> None:
    made = []
    for kind in (GRPOTrainer, OurTrainer):
        model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
        made.append(trainer_of(kind, saved, tmp_path, model, loss_type="dapo", cast_lm_head_to_fp32=True))
    stock, ours = (loss_and_gradients(trainer, batch(seed=3)) for trainer in made)
    assert ours[0] == pytest.approx(stock[0], rel=1e-4)
    weight = "model.embed_tokens.weight"
    torch.testing.assert_close(ours[1][weight].float(), stock[1][weight].float(), rtol=0.03, atol=2e-3)
    made[1].model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_router_loss_of_a_mixture_of_experts(saved: Path, tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=290, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    made = [
        trainer_of(kind, saved, tmp_path, copy.deepcopy(model), loss_type="dapo") for kind in (GRPOTrainer, OurTrainer)
    ]
    assert made[0].aux_loss_enabled
    assert_same(made[0], made[1], batch(seed=4))


def test_only_action_tokens_reach_the_head(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = head_module.linear_logprob

    def spy(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden))
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(head_module, "linear_logprob", spy)
    ours, inputs = trainer_of(OurTrainer, saved, tmp_path, loss_type="dapo"), batch(seed=2, tools=True)
    ours._compute_loss(ours.model, inputs)
    assert seen == [int((inputs["completion_mask"] * inputs["tool_mask"]).sum())]


def rollout_with_tool_results(rows: list[Any], trainer: Any) -> dict[str, Any]:
    """Two sampled tokens, two of a tool, two sampled ones; the log-probs are not used."""
    ids = [[10 + i, 11, 12, 13, 14 + i, 15] for i in range(len(rows))]
    return {
        "prompt_ids": [[5, 6, 7][: 1 + i % 3] for i in range(len(rows))],
        "completion_ids": ids,
        "logprobs": None,
        "env_mask": [[1, 1, 0, 0, 1, 1] for _ in rows],
    }


def test_old_log_probs_leave_out_what_a_tool_said(saved: Path, tmp_path: Path) -> None:
    args = GRPOConfig(**settings(tmp_path, steps_per_generation=4, loss_type="dapo"))
    made = [
        kind(
            tiny_model(), reward, args=args, train_dataset=prompts(), processing_class=tiny_tokenizer(),
            rollout_func=rollout_with_tool_results,
        )
        for kind in (GRPOTrainer, OurTrainer)
    ]  # fmt: skip
    rows = [{"prompt": "abc"}] * 16
    stock, ours = (trainer._generate_and_score_completions(copy.deepcopy(rows)) for trainer in made)
    tool = stock["tool_mask"] == 0
    assert tool.any() and (ours["old_per_token_logps"][tool] == 0).all()
    torch.testing.assert_close(ours["old_per_token_logps"][~tool], stock["old_per_token_logps"][~tool])


@pytest.mark.parametrize("stock", [GRPOTrainer, RLOOTrainer])
def test_a_patched_trainer_trains_as_before(stock: Any, saved: Path, tmp_path: Path) -> None:
    weights = []
    for patched in (False, True):
        trainer = trainer_of(stock, saved, tmp_path, learning_rate=1e-3)
        if patched:
            assert patch_trainer(trainer) is trainer and patch_trainer(trainer) is trainer
            assert isinstance(trainer, LogProbMixin) and isinstance(trainer, stock)
        trainer.train()
        weights.append(trainer.model.state_dict())
    start = tiny_model(tie_word_embeddings=False).state_dict()
    assert weights[0].keys() == weights[1].keys()
    assert any((weights[0][name] != start[name]).any() for name in start)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_patched_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="object has no log-probs of completions"):
        patch_trainer(object())
    trainer = trainer_of(GRPOTrainer, saved, tmp_path)
    trainer.model.lm_head = torch.nn.Sequential(trainer.model.lm_head)
    with pytest.raises(ConfigError, match="head of Qwen2ForCausalLM cannot be replaced"):
        patch_trainer(trainer)
    assert type(trainer) is GRPOTrainer


def test_a_forward_of_the_heads_own_is_refused_and_nothing_changes(saved: Path, tmp_path: Path) -> None:
    trainer = trainer_of(GRPOTrainer, saved, tmp_path, loss_type="grpo", beta=0.3)
    policy, reference = trainer.model.lm_head, trainer.ref_model.lm_head
    weight, own = policy.weight, reference.forward
    reference.forward = lambda hidden: own(hidden)
    with pytest.raises(ConfigError, match="lm_head has hooks of its own"):
        patch_trainer(trainer)
    assert type(trainer) is GRPOTrainer and "forward" in vars(reference)
    # The policy's head came first and was replaced already.
    assert trainer.model.lm_head is policy and policy.weight is weight and trainer.ref_model.lm_head is reference
    del reference.forward
    trainer._compute_loss(trainer.model, batch(seed=1)).backward()
    assert weight.grad is not None


def test_a_float32_head_comes_back_if_another_is_refused(saved: Path, tmp_path: Path) -> None:
    trainer = trainer_of(GRPOTrainer, saved, tmp_path, loss_type="grpo", beta=0.3, cast_lm_head_to_fp32=True)
    forward = trainer.model.lm_head.forward
    trainer.ref_model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has hooks of its own"):
        patch_trainer(trainer)
    assert trainer.model.lm_head.forward is forward and "forward" in vars(trainer.ref_model.lm_head)
