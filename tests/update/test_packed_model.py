"""The packed model: each sequence as if alone, for several architectures, and refusal of those that cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from spear_fast.batching import collate
from spear_fast.config.schema import ModelInit
from spear_fast.errors import ConfigError
from spear_fast.types import Segments
from spear_fast.update import model as model_module
from spear_fast.update.model import ATTENTION, PackedModel, build_model, load_model, probe_isolation

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}


def tiny(family: str, head: str = "ForCausalLM", **settings) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**{**TINY, "eos_token_id": 1, "bos_token_id": 2, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, family.removesuffix("Text") + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return model


def logits_of(policy: PackedModel, batch) -> torch.Tensor:
    weight, bias = policy.head
    return torch.nn.functional.linear(policy.hidden_states(batch), weight, bias)


@pytest.mark.parametrize("tie", [True, False])
def test_packed_equals_one_by_one(new_policy, new_rows, tie):
    policy, rows = new_policy(tie=tie), new_rows([9, 3, 30, 1, 17, 28])
    packed = logits_of(policy, collate(rows, range(len(rows)), "cpu")).split([row.num_tokens for row in rows])
    for row, logits in zip(rows, packed, strict=True):
        alone = policy.model(torch.from_numpy(row.tokens).long()[None]).logits[0]
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=2e-5)


def test_no_sequence_sees_another(policy, new_rows):
    rows = new_rows([9, 10, 11, 4])
    batch = collate(rows, range(len(rows)), "cpu")
    before = policy.hidden_states(batch)
    for changed in range(len(rows)):
        start = batch.segments.start[changed]
        end = start + rows[changed].num_tokens
        other = batch.input_ids.clone()
        other[start:end] = (other[start:end] + 1) % 64
        after = policy.hidden_states(dataclasses.replace(batch, input_ids=other))
        assert not torch.equal(after[start:end], before[start:end])
        keep = torch.ones(len(other), dtype=torch.bool)
        keep[start:end] = False
        assert torch.equal(after[keep], before[keep])


def test_tied_head_is_the_embedding(new_policy):
    for tie in (True, False):
        model = new_policy(tie=tie)
        assert (model.head[0] is model.model.get_input_embeddings().weight) == tie
        assert model.head[0].shape == (64, 32) and model.head[1] is None


def test_model_still_works_unpacked_with_padding(policy):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = policy.model(ids, attention_mask=mask).logits[1, :2]
    torch.testing.assert_close(padded, policy.model(ids[1:, :2]).logits[0], atol=2e-5, rtol=2e-5)
    assert policy.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)


FAMILIES = [
    ("Qwen2", {}),
    ("Qwen3", {}),
    ("Llama", {}),
    ("Mistral", {"sliding_window": 6}),
    ("Gemma", {}),
    ("Gemma3Text", {"sliding_window": 6}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_accepts_common_families(family, settings, dtype):
    policy = PackedModel(tiny(family, **settings).to(dtype))
    probe_isolation(policy)
    assert policy.model.config._attn_implementation == ATTENTION


def test_positions_restart_in_each_sequence():
    # Rotary models see relative positions only; GPT-2 learns absolute ones.
    policy = PackedModel(tiny("GPT2", head="LMHeadModel"))
    probe_isolation(policy)
    assert policy.model.config._attn_implementation == ATTENTION, "the probe must leave packed attention on"


def test_probe_refuses_a_leak(policy, monkeypatch):
    whole = lambda segments, *rest: plan(Segments.of([segments.length.sum()]), *rest)  # noqa: E731
    plan = model_module.plan_attention
    monkeypatch.setattr(model_module, "plan_attention", whole)
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM leaks: changing one packed sequence"):
        probe_isolation(policy)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Cohere", {}), ("Gemma2", {"final_logit_softcapping": 1.0}), ("GptOss", {"num_local_experts": 4})],
)
def test_probe_refuses_heads_and_attention_it_would_get_wrong(family, settings):
    with pytest.raises(ConfigError, match=f"{family}ForCausalLM gives other logits packed than alone"):
        probe_isolation(PackedModel(tiny(family, **settings)))


def test_models_without_registry_or_head_are_refused():
    with pytest.raises(ConfigError, match="does not take its attention from transformers' registry"):
        PackedModel(tiny("Bloom"))
    with pytest.raises(ConfigError, match="Qwen2Model is not a causal language model"):
        PackedModel(tiny("Qwen2", head="Model"))


def test_build_is_seeded_and_leaves_the_global_state():
    shape = ModelInit(hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, intermediate_size=48)
    state = torch.random.get_rng_state()
    models = [build_model(shape, vocab_size=64, eos_id=1, seed=seed, dtype=torch.float32) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert models[0].config.vocab_size == 64 and models[0].config.eos_token_id == 1


def test_save_and_load(policy, new_rows, tmp_path):
    policy.model.save_pretrained(tmp_path)
    loaded = PackedModel(load_model(str(tmp_path), torch.float32))
    batch = collate(new_rows([5, 8]), [0, 1], "cpu")
    assert torch.equal(loaded.hidden_states(batch), policy.hidden_states(batch))
    assert load_model(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_load_names_what_is_wrong(tmp_path, policy):
    with pytest.raises(ConfigError, match=r"model\.path='.*absent' is not a folder with a config.json"):
        load_model(str(tmp_path / "absent"), torch.float32)
    policy.model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not hold a causal model"):
        load_model(str(tmp_path), torch.float32)
    policy.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {name: tensor for name, tensor in policy.model.state_dict().items() if "layers.1.mlp" not in name}
    transformers.Qwen2ForCausalLM(policy.model.config).save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match="lacks weights of its own architecture"):
        load_model(str(tmp_path), torch.float32)
