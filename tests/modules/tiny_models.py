"""Transformers models of a few thousand weights, whose heads differ in every way that matters to `replace_lm_head`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCAB = 48
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = "mixture of experts"
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
FAMILIES = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {"tie_word_embeddings": False}),
    "bias": ("Phi", {}),
    "head of another name": ("GPTNeoX", {}),
    "soft-cap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "factor": ("Cohere", {"logit_scale": 0.25}),
    "divisor": ("Granite", {"logits_scaling": 8.0}),
    "factor called divisor": ("HyperCLOVAX", {"logits_scaling": 0.5}),
    "factor in the backbone": ("FalconH1", {"lm_head_multiplier": 0.3, **MAMBA}),
    "head asked for its type": ("Mamba", {"state_size": 4}),
    MIXTURE: ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_model(family: str = "tied", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, the head's of about unit logits, in eval mode."""
    transformers = pytest.importorskip("transformers")
    name, settings = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**SIZES, **settings, **changes}))
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()
    return model.to(dtype).eval()


def batch(seed: int = 0):
    """Token ids [3, 7] and labels, with first columns, whole stretches and a whole row not scored."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 7), generator=random)
    labels = ids.clone()
    labels[0, :3] = labels[1, 5:] = labels[2] = -100
    labels[2, 0] = ids[2, 0]
    return ids, labels


def scored(logits: Any, labels: Any, temperature: Any = 1.0) -> Any:
    """Log-probs and entropies [B, L] of labels, 0 where not scored, from logits [B, L, V] by the plain definition."""
    temperature = torch.as_tensor(temperature, dtype=logits.dtype).expand(labels.shape)
    every = torch.log_softmax(logits[:, :-1] / temperature[:, 1:, None], -1)
    logp = every.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    used = labels[:, 1:] != -100
    return [torch.nn.functional.pad(torch.where(used, values, 0), (1, 0)) for values in (logp, entropy)]
