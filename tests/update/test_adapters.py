"""LoRA and Liger in an unsharded model: what is refused, what is trained, and what an export leaves as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers.models.qwen2.modeling_qwen2 as qwen2

from spear_fast.errors import ConfigError, MissingDependencyError
from spear_fast.update import liger, lora
from spear_fast.update.liger import use_liger
from spear_fast.update.lora import add_adapters
from spear_fast.update.model import PackedModel, load_model

CUDA = torch.device("cuda")


def test_adapters_start_as_nothing_and_are_drawn_by_their_seed(new_policy):
    start, models = new_policy(), [new_policy() for _ in range(3)]
    state = torch.random.get_rng_state()
    for policy, seed in zip(models, (1, 1, 2), strict=True):
        add_adapters(policy.model, rank=4, alpha=8.0, targets=["q_proj", "down_proj"], seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in models[0].export_parameters():
        assert torch.equal(weight, start.model.get_parameter(name)), name
    first, same, other = ({name: p for name, p in m.model.named_parameters() if p.requires_grad} for m in models)
    assert first and all("lora_" in name for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name]) for name in drawn)


def test_export_adds_alpha_over_rank_of_b_times_a_and_changes_nothing(new_policy, tmp_path):
    policy = new_policy(tie=False)
    plain = copy.deepcopy(dict(policy.model.named_parameters()))
    add_adapters(policy.model, rank=4, alpha=8.0, targets=["q_proj"], seed=1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = copy.deepcopy(policy.model.state_dict())
    exported = dict(policy.export_parameters())
    assert exported.keys() == plain.keys()
    for name, weight in plain.items():
        layer = policy.model.get_submodule(name.rpartition(".")[0])
        expected = weight
        if name.endswith("q_proj.weight"):
            expected = (
                weight.double()
                + 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            )
        torch.testing.assert_close(exported[name], expected.float())
    policy.save_full(tmp_path / "half", torch.bfloat16)
    assert {weight.dtype for weight in load_model(str(tmp_path / "half"), "auto").parameters()} == {torch.bfloat16}  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


def test_adapters_that_cannot_be_are_refused(policy, monkeypatch):
    for targets, found in (
        (["q_proj", "qkv"], r"no linear layer called \['qkv'\]"),
        (["lm_head"], "lm_head"),
        ([], ""),
    ):
        with pytest.raises(ConfigError, match=f"model.lora.targets=.*{found}"):
            add_adapters(policy.model, rank=4, alpha=8.0, targets=targets, seed=1)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[lora\]"):
        add_adapters(policy.model, rank=4, alpha=8.0, targets=["q_proj"], seed=1)


def test_liger_only_where_it_can_run(policy, monkeypatch):
    assert not use_liger(policy.model, "off", CUDA) and not use_liger(policy.model, "auto", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model\.liger=on needs CUDA"):
        use_liger(policy.model, "on", torch.device("cpu"))
    monkeypatch.setattr(policy.model.config, "model_type", "unheard_of")
    assert not use_liger(policy.model, "auto", CUDA)
    with pytest.raises(ConfigError, match="no kernels for 'unheard_of'"):
        use_liger(policy.model, "on", CUDA)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert not use_liger(policy.model, "auto", CUDA)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[liger\]"):
        use_liger(policy.model, "on", CUDA)


def test_liger_takes_the_blocks_and_leaves_the_head(policy, monkeypatch):
    for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP"):
        monkeypatch.setattr(qwen2, name, getattr(qwen2, name))  # undone afterwards
    forward = policy.model.forward
    assert use_liger(policy.model, "auto", CUDA)
    assert policy.model.forward == forward
    for block in policy.model.model.layers:
        for part in (block.mlp, block.input_layernorm, block.post_attention_layernorm):
            assert part.forward.__module__.startswith("liger_kernel"), type(part)
    assert qwen2.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert isinstance(policy, PackedModel) and policy.head[0] is policy.model.get_input_embeddings().weight
