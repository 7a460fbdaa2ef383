"""Weights pushed into real vLLM engines: every family lands where vLLM samples from, and stale values are found."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.rollout.vllm_engine import VllmEngine
from spear_fast.rollout.vllm_factory import make_vllm_engine
from spear_fast.rollout.weight_layout import WeightLayout
from spear_fast.sync.push import push_weights

VOCAB = 300
"""vLLM pads it to 320."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True, "hidden_size": 128},  # its heads are as wide as hidden_size allows
    "Qwen3": {"tie_word_embeddings": False},
    "Llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"tie_word_embeddings": False, "dtype": torch.bfloat16},
    "Gemma": {"tie_word_embeddings": True},
    "Gemma2": {"tie_word_embeddings": True},  # untied ones do not exist in vLLM
    "Gemma3Text": {"tie_word_embeddings": True},
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Nats between the log-probs of vLLM and of transformers; products of such small numbers differ by several ulp."""
PROMPTS = ([5, 17, 250, 3, 99], [1, 2])


@pytest.fixture(scope="module", autouse=True)
def quick_start() -> Iterator[None]:
    """vLLM looks at each new architecture in a process of its own, which imports all of vLLM again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
        yield


def make_model(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    """Random float32 weights, norms and biases included, whose log-probs are far from uniform."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def start(folder: Path, dtype: torch.dtype) -> VllmEngine:
    return make_vllm_engine(
        str(folder),
        placement="inproc",
        dtype=str(dtype).removeprefix("torch."),
        max_model_tokens=64,
        max_concurrent=4,
        vocab_size=VOCAB,
        kv_cache_bytes=None,
        max_batched_tokens=128,
        enforce_eager=True,
        prefix_caching=True,
        sleep_level=0,
        deterministic=False,
        device=torch.device("cpu"),
        seed=0,
    )


def push(model: PreTrainedModel, engine: VllmEngine, version: int, dtype: torch.dtype) -> dict[str, float]:
    return push_weights(model.named_parameters(), engine, version, dtype=dtype, bucket_bytes=1 << 20, verify=True)


def layout_of(engine: VllmEngine) -> WeightLayout:
    return engine._core._core._layout  # type: ignore[attr-defined]


def assert_in_place(model: PreTrainedModel, engine: VllmEngine) -> None:
    """Every parameter is where vLLM's own names say, computed here by hand."""
    held = dict(layout_of(engine)._parameters)
    dtype = next(iter(held.values())).dtype
    named = {name: parameter.to(dtype) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, value in held.items():
        for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if fused in name:
                expected = torch.cat([named.pop(name.replace(fused, part)) for part in parts])
                break
        else:
            expected = named.pop(name)
        assert torch.equal(value[: len(expected)], expected) and not value[len(expected) :].any(), name
    assert not named.keys() - {"lm_head.weight"}


def sample(engine: VllmEngine) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        requests = [
            GenerationRequest(uid, list(prompt), max_tokens=6, temperature=0.0, stop_ids=(), seed=uid)
            for uid, prompt in enumerate(PROMPTS)
        ]
        return await asyncio.gather(*map(engine.generate, requests))

    return asyncio.run(all_of_them())


@torch.no_grad()
def assert_agrees(model: PreTrainedModel, completions: list[Completion], dtype: torch.dtype) -> None:
    """The tokens are the most likely ones of transformers, with its log-probs."""
    model = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
    tolerance = TOLERANCE[dtype]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = torch.tensor([[*prompt, *completion.tokens]])
        logits: Tensor = model(tokens).logits[0, len(prompt) - 1 : -1].float()
        best, _ = logits.log_softmax(-1).max(-1)
        chosen = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(chosen, best, atol=tolerance, rtol=0)
        torch.testing.assert_close(torch.tensor(completion.logps), chosen, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_samples_from_what_was_pushed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, FAMILIES[family])
    dtype = FAMILIES[family].get("dtype", torch.float32)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    engine = start(tmp_path, dtype)
    try:
        for version in (1, 2):  # the first goes through vLLM's loader, the second straight into place
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.02)
            metrics = push(model, engine, version, dtype)
            assert metrics["sync/unverified"] == 0
            assert_in_place(model, engine)
            assert_agrees(model, sample(engine), dtype)
        forget_one(monkeypatch)
        with pytest.raises(
            EngineError, match=r"values of model\.layers\.1\.mlp\.up_proj\.weight are not the trainer's"
        ):
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj" in n).mul_(1.01)
            push(model, engine, 3, dtype)
    finally:
        engine.close()


def forget_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layout believe that it wrote a parameter that it did not write."""
    write = WeightLayout.write

    def forgetful(self: WeightLayout, name: str, tensor: Tensor) -> None:
        write(self, name, self.read(name).clone() if "layers.1.mlp.up_proj" in name else tensor)

    monkeypatch.setattr(WeightLayout, "write", forgetful)
