"""A replaced head on two gloo ranks: FSDP2 and DDP give the gradients of one process; docs/examples/loop.py runs.

The processes are started once, for all cases.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from spear_kernels import PolicyInputs, PolicyLossConfig, replace_lm_head
from spear_kernels.testing import run_ranks
from tests.modules.tiny_models import VOCAB, tiny_model

LOOP = Path(__file__).parents[2] / "docs" / "examples" / "loop.py"
MODES = ("ddp", "fsdp2")
CFG = PolicyLossConfig("ppo", clip_high=0.28, entropy_coef=0.01)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return replace_lm_head(tiny_model(family))


def batch() -> tuple[torch.Tensor, ...]:
    """Four rows of ids and labels, of which the second rank's have no label, log-probs and advantages."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (4, 7), generator=random)
    labels = ids.clone()
    labels[:, :3] = labels[2:] = -100
    return ids, labels, torch.randn(4, 7, generator=random) - 6, torch.randn(4, generator=random)


def sharded(family: str, **settings: Any) -> Any:
    """The model over all ranks with sums of gradients; an untied head is a part of its own."""
    model = model_of(family)
    parts = [*model.model.layers, *([model.lm_head] if family == "untied" else []), model]
    for part in parts:
        fully_shard(part, **settings)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def gradients(model: Any, rows: slice, with_loss: bool) -> dict[str, torch.Tensor]:
    ids, labels, old_logp, advantages = batch()
    num_tokens = (labels[:, 1:] != -100).sum()
    if with_loss:
        inputs = PolicyInputs(labels[rows], old_logp[rows], advantages[rows], CFG, num_tokens=num_tokens)
        loss = model(input_ids=ids[rows], policy_inputs=inputs).loss
    else:
        out = model(input_ids=ids[rows], logp_labels=labels[rows])
        loss = (advantages[rows, None] * out.logp - 0.01 * out.entropy).sum() / num_tokens
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def precision(rank: int) -> tuple[float, torch.dtype]:
    """Mean ratio of log-probs handed back as old ones where FSDP2 runs in bfloat16, and their type."""
    model = sharded("tied", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    ids, labels, _, advantages = batch()
    with torch.no_grad():
        old_logp = model(input_ids=ids, logp_labels=labels).logp
        out = model(input_ids=ids, policy_inputs=PolicyInputs(labels, old_logp, advantages, CFG))
    assert out.metrics is not None
    return out.metrics["ratio_mean"].item(), out.logp.dtype


def loop(mode: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    norms, model = runpy.run_path(str(LOOP))["train"](mode)
    weights = {name.removeprefix("module."): weight.detach() for name, weight in model.named_parameters()}
    return norms, {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in weights.items()}


def work(rank: int) -> dict[str, Any]:
    rows = slice(2 * rank, 2 * rank + 2)
    results: dict[str, Any] = {mode: loop(mode) for mode in MODES}
    results["precision"] = precision(rank)
    for family in ("tied", "untied"):
        model = sharded(family)
        results[family] = [gradients(model, rows, with_loss) for with_loss in (True, False)]
    head = model_of("untied").lm_head
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight, init_device_mesh("cpu", (2,)), [Shard(0)]))
    with pytest.raises(ValueError, match="still a DTensor"):
        head(torch.zeros(4, 16), object())
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(work, 2, tmp_path_factory.mktemp("ranks"))


def assert_same(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * value.abs().max().item() + 1e-9, msg=name)


@pytest.mark.parametrize("family", ["tied", "untied"])
def test_sharded_models_give_the_gradients_of_one_process(family: str, ranks: list[dict[str, Any]]) -> None:
    for index, with_loss in enumerate((True, False)):
        truth = gradients(model_of(family), slice(None), with_loss)
        for results in ranks:
            assert_same(results[family][index], truth)


def test_policy_inputs_keep_their_precision_where_fsdp2_rounds_arguments(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        ratio, dtype = results["precision"]
        assert ratio == pytest.approx(1.0, abs=1e-5) and dtype == torch.float32


def test_the_loop_of_the_documentation_gives_the_same_on_ranks(ranks: list[dict[str, Any]]) -> None:
    norms, weights = loop("one process")
    for results in ranks:
        for mode in MODES:
            assert results[mode][0] == pytest.approx(norms, rel=1e-4), mode
            for name, weight in weights.items():
                # Two steps of AdamW at 1e-3 move a weight by about 2e-3.
                torch.testing.assert_close(results[mode][1][name], weight, rtol=0, atol=2e-5, msg=f"{mode} {name}")
