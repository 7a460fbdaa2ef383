"""The fused head in verl: what a model patched by verl returns, against its own logits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import HFModelConfig

import spear_fast.integrations.verl as integration
from spear_fast.errors import ConfigError
from spear_fast.integrations.verl import patch_fused_head
from tests.verl.batches import actor

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture(autouse=True)
def verls_own_forward() -> Iterator[None]:
    """verl patches the class of the model; every test begins and ends with the original and verl's own head."""
    forward, head = Qwen2ForCausalLM.forward, FusedLinearForPPO.forward
    yield
    Qwen2ForCausalLM.forward, FusedLinearForPPO.forward = forward, head


def tiny_config(tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        architectures=["Qwen2ForCausalLM"],
    )


def fused(model: Qwen2ForCausalLM, backend: str = "torch") -> Qwen2ForCausalLM:
    apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend)
    return model


def objective(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A number that depends on every log-prob and entropy differently."""
    weight = torch.linspace(-1, 1, log_probs.numel(), dtype=torch.float64).view(log_probs.shape)
    return (weight * log_probs.double()).sum() + (weight.flip(0) * entropy.double()).sum()


def gradients(model: Qwen2ForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_a_model_patched_by_verl_gives_what_its_logits_give(
    dtype: torch.dtype, tolerance: float, tied: bool, temperature: float
) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tied)).to(dtype)
    logp = (model(IDS).logits / temperature).log_softmax(-1)
    expected = logp.gather(-1, IDS.roll(-1, 1)[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    expected_gradients = gradients(model, objective(*expected))
    fused(model)
    with patch_fused_head():
        output = model(input_ids=IDS, temperature=temperature, return_dict=True)
        found_gradients = gradients(model, objective(output.log_probs, output.entropy))
    assert output.log_probs.shape == output.entropy.shape == IDS.shape
    torch.testing.assert_close((output.log_probs, output.entropy), expected, rtol=tolerance, atol=tolerance)
    assert found_gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_the_same_as_verls_own_head_and_given_back_after(backend: str) -> None:
    torch.manual_seed(1)
    model = fused(Qwen2ForCausalLM(tiny_config()), backend)
    own_forward = FusedLinearForPPO.forward

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        output = model(input_ids=IDS, temperature=0.7, return_dict=True)
        return output.log_probs, output.entropy

    theirs = call()
    with patch_fused_head() as patch:
        assert FusedLinearForPPO.forward is not own_forward
        ours = call()
    assert FusedLinearForPPO.forward is own_forward
    patch.undo()
    assert FusedLinearForPPO.forward is own_forward
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, objective(*ours)), gradients(model, objective(*call())))


def test_rows_without_a_batch_dimension_and_a_tensor_of_temperatures() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([3, 0, 10, 7, 7], dtype=torch.int32)
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.3], dtype=torch.float64)
    logp = (hidden @ weight.T / temperature[:, None]).log_softmax(-1)
    expected = logp.gather(-1, ids.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    with patch_fused_head(chunk_bytes=4096):
        found = FusedLinearForPPO().forward(hidden, weight, ids, temperature)
    torch.testing.assert_close(found, expected)


def test_bfloat16_gives_float32_closer_to_the_truth_than_verl() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 40, 16, generator=generator).bfloat16()
    weight = torch.randn(50, 16, generator=generator).bfloat16()
    ids = torch.randint(50, (2, 40), generator=generator)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    theirs, their_entropy = FusedLinearForPPO().forward(hidden, weight, ids)
    with patch_fused_head():
        ours, entropy = FusedLinearForPPO().forward(hidden, weight, ids)
    assert ours.dtype == entropy.dtype == torch.float32
    assert (ours - exact).abs().max() < 0.1 * (theirs - exact).abs().max()
    torch.testing.assert_close(entropy, their_entropy.float(), rtol=0.05, atol=0.05)


def test_a_second_patch_and_shapes_that_do_not_fit_are_refused() -> None:
    with patch_fused_head():
        with pytest.raises(ConfigError, match="replaced already"):
            patch_fused_head()
        with pytest.raises(ConfigError, match=r"input_ids \(3,\)"):
            FusedLinearForPPO().forward(torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(3, dtype=torch.long))
    patch_fused_head().undo()


def test_results_are_no_views_of_which_fsdp2_warns() -> None:
    with patch_fused_head():
        results = FusedLinearForPPO().forward(torch.ones(2, 3, 4), torch.ones(9, 4, requires_grad=True), IDS[:, :3])
    assert not any(result._is_view() for result in results)


def test_a_sharded_head_is_refused_with_a_remedy() -> None:
    """FSDP2 wraps an untied lm_head by itself; verl's own head then fails in the product."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.ones(9, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        arguments = torch.ones(2, 3, 4), weight, IDS[:, :3]
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            FusedLinearForPPO().forward(*arguments)
        with patch_fused_head(), pytest.raises(ConfigError, match=r"Shard\(dim=0\).*actor.strategy=fsdp"):
            FusedLinearForPPO().forward(*arguments)
    finally:
        torch.distributed.destroy_process_group()


EXAMPLES = [
    code
    for text in (integration.__doc__ or "", *(page.read_text() for page in (ROOT / "docs").glob("*.md")))
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if "spear_fast.integrations.verl" in code
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_the_package_and_of_the_documentation_run(code: str) -> None:
    model, shape = Qwen2ForCausalLM(tiny_config()), (2, IDS.shape[1] - 1)
    batch = SimpleNamespace(
        input_ids=IDS,
        old_log_prob=torch.full(shape, -4.0),
        advantages=torch.randn(shape),
        mask=torch.ones(shape, dtype=torch.bool),
    )
    exec(compile(code, "example", "exec"), {"model": model, "batch": batch, "actor": actor()})
    assert model.lm_head.weight.grad is not None and model.lm_head.weight.grad.any()


def test_verls_model_settings_load_the_head(tmp_path: Path) -> None:
    """external_lib is read by the model configuration that each worker of a run builds."""
    tiny_config().save_pretrained(tmp_path)
    settings = {"override_config": {"attn_implementation": "eager"}, "load_tokenizer": False}
    own_forward = FusedLinearForPPO.forward
    HFModelConfig(path=str(tmp_path), external_lib="spear_fast.integrations.verl.fused", **settings)
    assert FusedLinearForPPO.forward is not own_forward
    from spear_fast.integrations.verl import fused as module

    module.patch.undo()
    assert FusedLinearForPPO.forward is own_forward
