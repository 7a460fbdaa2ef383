"""Shapes of models against the models that transformers builds from the same config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from spear_fast.config.schema import ModelInit
from spear_fast.errors import ConfigError
from spear_fast.memory.shapes import find_shape, shape_of_file, shape_of_init
from spear_fast.update.model import build_model

# Numbers that cannot be mistaken for each other; 3 heads of 8 are not the width, where a family allows that.
SMALL = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 37,
    "pad_token_id": None,
}
MODELS = [
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen2", {"tie_word_embeddings": False, "attention_bias": True}),
    ("Qwen3", {"head_dim": 8}),
    ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    ("Mistral", {"head_dim": 14}),
    ("Mistral", {"attention_bias": True}),
    ("Gemma", {"head_dim": 8}),
    ("Gemma", {}),
    ("Gemma2", {"head_dim": 8}),
    ("Gemma3Text", {"head_dim": 8}),
]


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_parameters_and_cache_are_those_of_the_model(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL, **changes)
    config.save_pretrained(tmp_path)
    name = {"Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(config)
    shape = shape_of_file(tmp_path / "config.json")
    assert shape.num_parameters == model.num_parameters()
    decoder = model.get_decoder()
    assert shape.block_parameters == sum(p.numel() for p in decoder.layers[0].parameters())
    assert shape.embedding_parameters == decoder.embed_tokens.weight.numel()
    assert shape.tied == (model.lm_head.weight is decoder.embed_tokens.weight)
    layer = decoder.layers[0].self_attn
    assert shape.kv_bytes_per_token("bfloat16") == 3 * 2 * (layer.k_proj.out_features + layer.v_proj.out_features)


def test_a_random_model_has_the_shape_of_its_settings() -> None:
    init = ModelInit(hidden_size=24, num_heads=6, num_kv_heads=3, intermediate_size=20, vocab_size=31)
    model = build_model(init, vocab_size=31, eos_id=0, seed=0, dtype=torch.float32)
    assert shape_of_init(init).num_parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-1.5B-Instruct", 1.54), ("qwen2.5-7b", 7.62), ("Qwen2.5-32B", 32.76), ("Qwen3-32B", 32.76)],
)
def test_shipped_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    """The sizes on the models' cards; folder names are matched without case and without -Instruct."""
    folder = Path(__file__).parents[2] / "configs/paper/shapes"
    shape = find_shape(f"models/{name}", ModelInit(), [folder])
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_adapters_are_counted_per_layer() -> None:
    shape = shape_of_init(ModelInit(hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, intermediate_size=10))
    assert shape.lora_parameters(2, ["q_proj", "down_proj"]) == 3 * 2 * ((16 + 16) + (10 + 16))
    with pytest.raises(ConfigError, match=r"model.lora.targets names 'head'.*q_proj"):
        shape.lora_parameters(2, ["head"])


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "mamba"}', "model_type='mamba'.*qwen2"),
        (json.dumps({**SMALL, "model_type": "qwen2", "hidden_size": "20"}), "hidden_size must be there"),
    ],
)
def test_a_file_without_a_shape_is_refused(text: str, needle: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=needle):
        find_shape(str(tmp_path), ModelInit())


def test_an_unknown_folder_names_the_known_shapes() -> None:
    with pytest.raises(ConfigError, match=r"model.path='nowhere'.*known: none.*--shape"):
        find_shape("nowhere", ModelInit())
