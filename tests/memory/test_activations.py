"""The formula of activations against what autograd really keeps, and the optimizer's state against AdamW's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from spear_fast.batching import collate
from spear_fast.config.load import load_config
from spear_fast.config.machine import ParallelConfig
from spear_fast.config.schema import ModelInit
from spear_fast.dist import Ranks
from spear_fast.memory.shapes import ModelShape, shape_of_init, shape_of_settings
from spear_fast.memory.training import Training
from spear_fast.types import MicroBatch, Row
from spear_fast.update.model import PackedModel, build_model
from spear_fast.update.optimizer import Optimizer, OptimizerSettings
from spear_fast.update.sharding import shard

# Wide enough that indices and the rotary table, which the formula leaves out, are below one part in a hundred.
SHAPE = {"hidden_size": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 320}


def kept_bytes(model: PreTrainedModel, lengths: Sequence[int], *, checkpointing: bool) -> int:
    """Bytes of all tensors that a packed forward pass saves for the backward, each storage once, without weights."""
    packed = PackedModel(model)
    shard(packed, Ranks(0, 1, torch.device("cpu")), ParallelConfig(activation_checkpointing=checkpointing), model.dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = packed.hidden_states(micro_batch(lengths))
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def micro_batch(lengths: Sequence[int]) -> MicroBatch:
    """Packed sequences of these lengths; which tokens are actions does not matter here."""
    rows = []
    for uid, length in enumerate(lengths):
        nothing = np.zeros(length, dtype=np.float32)
        tokens = np.full(length, uid, dtype=np.int32)
        rows.append(Row(uid, uid, 0, tokens, np.arange(length) > 0, nothing, nothing))
    return collate(rows, range(len(rows)), "cpu")


def planned(shape: ModelShape, tokens: int, dtype: str, *, checkpointing: bool) -> int:
    return training(shape, f"model.dtype={dtype}", f"parallel.activation_checkpointing={checkpointing}".lower(),
                    f"update.token_budget={tokens}").activations()  # fmt: skip


def training(shape: ModelShape, *overrides: str) -> Training:
    base: dict[str, Any] = {"name": "run", "steps": 1, "task": {"name": "guess"}, "model": {"path": "somewhere"}}
    return Training(shape, load_config(None, ["rollout.max_tokens=64", *overrides], base), num_ranks=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("lengths", "factor"), [([128, 128], 1.02), ([128, 110, 60, 31], 1.08)])
def test_activations_of_qwen2_are_predicted(dtype: str, checkpointing: bool, lengths: list[int], factor: float) -> None:
    """To 2 %; uneven sequences are padded a little for SDPA, which the formula leaves out.

    What a checkpointed block computes again is kept only in the backward pass, so the count lacks it. Its size is that
    of a block without checkpointing, which the other cases measure.
    """
    init = ModelInit(**SHAPE, vocab_size=50, max_positions=128)
    model = build_model(init, vocab_size=50, eos_id=0, seed=0, dtype=getattr(torch, dtype))
    shape = shape_of_init(init)
    counted = kept_bytes(model, lengths, checkpointing=checkpointing)
    expected = planned(shape, sum(lengths), dtype, checkpointing=checkpointing)
    if checkpointing:
        expected -= sum(lengths) * training(shape, f"model.dtype={dtype}").block_bytes_per_token()
    assert expected / 1.02 <= counted <= expected * factor


def test_activations_of_norms_inside_attention_are_predicted() -> None:
    config = Qwen3Config(hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=48, vocab_size=50, pad_token_id=None)  # fmt: skip
    shape = shape_of_settings(config.to_dict(), "the test")
    counted = kept_bytes(Qwen3ForCausalLM(config).bfloat16(), [128, 128], checkpointing=False)
    assert counted == pytest.approx(planned(shape, 256, "bfloat16", checkpointing=False), rel=0.02)


def test_optimizer_state_is_that_of_adamw() -> None:
    init = ModelInit(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64, vocab_size=50)
    model = build_model(init, vocab_size=50, eos_id=0, seed=0, dtype=torch.float32)
    optimizer = Optimizer(model.parameters(), OptimizerSettings(lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()["adamw"]["state"].values()
    moments = sum(value.nbytes for state in states for value in state.values() if value.ndim)
    plan = training(shape_of_init(init))
    assert moments == plan.optimizer_state()
    assert plan.master_weights() == sum(parameter.nbytes for parameter in model.parameters())
